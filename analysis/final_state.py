"""The last known state of a run's policy: from ``scores/``, or else from the last evaluation.

The report and the diagnosis both judge a run by it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from dpo_opt.analysis.load import PAIR_LOGPS_FOLDER, ShardSlice, scan_pair_logps
from dpo_opt.analysis.outcomes import Outcome, final_pairs, outcome
from dpo_opt.analysis.run_files import Run
from dpo_opt.schemas.pair_logps import dtype_of_logps

SCORES_FOLDER = "scores"


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalState:
    """The pairs under the last state of the policy for which their log-probs are known."""

    pairs: pl.DataFrame
    scored: bool
    """True if the log-probs are from ``scores/``, False if they are from the last evaluation."""
    step: int
    """After how many updates."""
    label: str
    """Which state, in words."""
    dtype: str | None
    """What the scored checkpoint computed in; None if it is not known."""
    splits: dict[str, Outcome]
    """``all``, ``training``, ``held-out``: those that can be told apart."""

    @property
    def judged_by(self) -> str:
        """The pairs that say how good the policy is: those that it was not trained on, if there are any."""
        return "held-out" if "held-out" in self.splits else "all"

    @property
    def judging(self) -> pl.DataFrame:
        """The pairs of :attr:`judged_by`."""
        return self.pairs.filter("held_out") if self.judged_by == "held-out" else self.pairs


def held_out_rows(logps: pl.LazyFrame | None) -> pl.Series:
    """Row numbers of the pairs that a run was evaluated on; none without its pair log-probs."""
    if logps is None:
        return pl.Series("row", [], dtype=pl.Int64)
    rows = logps.filter(pl.col("phase") == "eval").select(pl.col("row").unique())
    return rows.collect(engine="streaming")["row"]


def final_state(
    run: Run, logps: pl.LazyFrame | None, slices: Sequence[ShardSlice], held_out: pl.Series
) -> FinalState | None:
    """The last state of a run's policy with known log-probs; None if there is none.

    Args:
        run: The run.
        logps: Its pair log-probs, if there are any.
        slices: From ``shard_slices``, of the run's shards.
        held_out: From :func:`held_out_rows`.

    Raises:
        DataError: A table is damaged, or its pairs are not those of the run's shards.
    """
    scored = bool(run.tables(SCORES_FOLDER))
    if scored:
        # If several checkpoints were scored, the one that was trained longest is shown.
        scores = scan_pair_logps(run.path / SCORES_FOLDER)
        states = scores.select("step", "checkpoint").unique().sort("step", "checkpoint")
        chosen = states.last().collect(engine="streaming")
        if not len(chosen):
            return None
        step, checkpoint = chosen.row(0)
        dtypes = {dtype_of_logps(file) for file in run.tables(SCORES_FOLDER)}
        same = (pl.col("step") == step) & pl.col("checkpoint").eq_missing(pl.lit(checkpoint, dtype=pl.String))
        table = scores.filter(same)
        where = str(run.path / SCORES_FOLDER)
        label = f"the scored checkpoint {checkpoint or ''}".strip() + f" (step {step:,})"
    elif logps is not None and len(held_out):
        evaluated = logps.filter(pl.col("phase") == "eval")
        step = evaluated.select(pl.col("step").max()).collect(engine="streaming").item()
        table = evaluated.filter(pl.col("step") == step)
        dtypes = set()
        where = str(run.path / PAIR_LOGPS_FOLDER)
        label = f"the held-out pairs at the last evaluation (step {step:,})"
    else:
        return None
    pairs = final_pairs(table, slices, held_out=held_out, where=where)
    parts = {"all": pairs} if scored else {}
    if len(held_out):
        parts["training"] = pairs.filter(~pl.col("held_out"))
        parts["held-out"] = pairs.filter(pl.col("held_out"))
    splits = {
        name: outcome(part, beta=run.beta, noise=run.margin_noise)
        for name, part in parts.items()
        if len(part)
    }
    if not splits:
        return None
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    return FinalState(pairs=pairs, scored=scored, step=step, label=label, dtype=dtype, splits=splits)
