"""What training did to completions that have a label of their own, as KTO learns from them.

A row's own completion is the side that its label names: chosen where it is desirable, rejected where not.
The other side belongs to another prompt, and nothing here is about it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import polars as pl

from dpo_opt.analysis import rewards
from dpo_opt.analysis.final_state import final_pairs, last_logps, split_pairs
from dpo_opt.analysis.run_files import Run
from dpo_opt.analysis.slices import ShardSlice


class LabelledOutcome(NamedTuple):
    """Results for a set of rows with one completion each."""

    desirable: int
    undesirable: int
    prompts: int
    mean_desirable_logratio: float | None
    """In nats per completion; None without such rows. Times beta it is the mean reward."""
    mean_undesirable_logratio: float | None
    desirable_fell: float | None
    """Share of the desirable completions that became less likely."""
    undesirable_fell: float | None
    separated: float | None
    """Share of all pairs of a desirable and an undesirable row in which the desirable one has the higher
    reward, half of the ties included; None where one kind is missing. 0.5 is chance."""


class LabelledState(NamedTuple):
    """The rows under the last state of the policy for which their log-probs are known."""

    label: str
    """Which state, in words."""
    scored: bool
    """True if the log-probs are from ``scores/``, False if they are from the last evaluation."""
    splits: dict[str, LabelledOutcome]
    """``all``, ``training``, ``held-out``: those that can be told apart."""

    @property
    def judged_by(self) -> str:
        """The rows that say how good the policy is: those that it was not trained on, if there are any."""
        return "held-out" if "held-out" in self.splits else "all"


def labelled_state(
    run: Run, logps: pl.LazyFrame | None, slices: Sequence[ShardSlice], held_out: pl.Series, scratch: Path
) -> LabelledState | None:
    """The final state of a run on unpaired rows; the arguments are those of ``final_state``.

    Raises:
        DataError: The rows are not those of the shards.
    """
    last = last_logps(run, logps, held_out)
    if last is None:
        return None
    rows = final_pairs(last, slices, held_out=held_out, scratch=scratch)
    parts = split_pairs(rows, scored=last.scored, held_out=held_out)
    outcomes = {name: labelled_outcome(part) for name, part in parts.items()}
    splits = {name: found for name, found in outcomes.items() if found.desirable or found.undesirable}
    return LabelledState(last.label, last.scored, splits) if splits else None


def labelled_outcome(rows: pl.LazyFrame) -> LabelledOutcome:
    """Summarize rows with one completion each.

    Args:
        rows: From ``final_pairs`` of a folder of unpaired rows: of a mismatched completion the reference's
            log-prob is null.
    """
    chosen, rejected = rewards.chosen_logratio(), rewards.rejected_logratio()
    means = rows.select(
        desirable=chosen.count(),
        undesirable=rejected.count(),
        prompts=pl.col("prompt").n_unique(),
        mean_desirable_logratio=chosen.mean(),
        mean_undesirable_logratio=rejected.mean(),
        desirable_fell=rewards.chosen_fell().mean(),
        undesirable_fell=rewards.rejected_fell().mean(),
    )
    found = means.collect(engine="streaming").row(0, named=True)
    logratios = rows.select(chosen=chosen, rejected=rejected).collect(engine="streaming")
    return LabelledOutcome(**found, separated=_separated(logratios))


def _separated(logratios: pl.DataFrame) -> float | None:
    """Mann and Whitney's U divided by its largest value: the area under the ROC curve."""
    count, others = logratios["chosen"].count(), logratios["rejected"].count()
    if not count or not others:
        return None
    ranks = logratios.select(
        pl.coalesce("chosen", "rejected").rank("average").alias("rank"),
        pl.col("chosen").is_not_null().alias("desirable"),
    )
    total = float(ranks.filter("desirable")["rank"].sum())
    return (total - count * (count + 1) / 2) / (count * others)
