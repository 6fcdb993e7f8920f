"""Finds the last state of the policy whose log-probs are known, and joins its pairs with the reference's.

The joined pairs lie in files of a scratch folder and are scanned there, so that a report of any number of
pairs needs the same memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import polars as pl

from dpo_opt.analysis.load import scan_pair_logps
from dpo_opt.analysis.outcomes import Outcome, outcome
from dpo_opt.analysis.run_files import Run
from dpo_opt.analysis.slices import ShardSlice, by_slice, with_reference
from dpo_opt.schemas.pair_logps import dtype_of_logps
from dpo_opt.schemas.run_layout import PAIR_LOGPS, SCORES

_POLICY = ("row", "pair", "chosen_logps", "rejected_logps", "chosen_length", "rejected_length")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalState:
    """The pairs under the last state of the policy for which their log-probs are known."""

    pairs: pl.LazyFrame
    """From :func:`final_pairs`."""
    table: pl.LazyFrame
    """The policy's log-probs of these pairs as they were written: ``PAIR_LOGPS_SCHEMA``."""
    count: int
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
    def judging(self) -> pl.LazyFrame:
        """The pairs of :attr:`judged_by`."""
        return self.pairs.filter("held_out") if self.judged_by == "held-out" else self.pairs


def held_out_rows(logps: pl.LazyFrame | None) -> pl.Series:
    """Row numbers of the pairs that a run was evaluated on; none without its pair log-probs."""
    if logps is None:
        return pl.Series("row", [], dtype=pl.Int64)
    rows = logps.filter(pl.col("phase") == "eval").select(pl.col("row").unique())
    return rows.collect(engine="streaming")["row"]


class LastLogps(NamedTuple):
    """The policy's last known log-probs, as they were written."""

    table: pl.LazyFrame
    """``PAIR_LOGPS_SCHEMA``."""
    state: pl.Expr
    """True for the rows of the policy's last state."""
    step: int
    scored: bool
    """See :class:`FinalState`; so are the next two."""
    label: str
    dtype: str | None
    where: str
    """Name of the table, for messages."""


def last_logps(run: Run, logps: pl.LazyFrame | None, held_out: pl.Series) -> LastLogps | None:
    """What was scored last, or else evaluated last; None if no log-probs are known.

    Args:
        run: The run.
        logps: What training and evaluations wrote; None if nothing.
        held_out: From :func:`held_out_rows`.
    """
    if run.tables(SCORES):
        # If several checkpoints were scored, the one that was trained longest is shown.
        scores = scan_pair_logps(run.path / SCORES)
        states = scores.select("step", "checkpoint").unique().sort("step", "checkpoint")
        chosen = states.last().collect(engine="streaming")
        if not len(chosen):
            return None
        step, checkpoint = chosen.row(0)
        dtypes = {dtype_of_logps(file) for file in run.tables(SCORES)}
        same = (pl.col("step") == step) & pl.col("checkpoint").eq_missing(pl.lit(checkpoint, dtype=pl.String))
        return LastLogps(
            scores,
            same,
            step,
            scored=True,
            label=f"the scored checkpoint {checkpoint or ''}".strip() + f" (step {step:,})",
            dtype=dtypes.pop() if len(dtypes) == 1 else None,
            where=str(run.path / SCORES),
        )
    if logps is None or not len(held_out):
        return None
    evaluated = logps.filter(pl.col("phase") == "eval")
    step = evaluated.select(pl.col("step").max()).collect(engine="streaming").item()
    return LastLogps(
        logps,
        (pl.col("phase") == "eval") & (pl.col("step") == step),
        step,
        scored=False,
        label=f"the held-out pairs at the last evaluation (step {step:,})",
        dtype=None,
        where=str(run.path / PAIR_LOGPS),
    )


def final_state(
    run: Run,
    logps: pl.LazyFrame | None,
    slices: Sequence[ShardSlice],
    held_out: pl.Series,
    scratch: Path | None = None,
) -> FinalState | None:
    """The run's final state; None if no pair's log-probs are known.

    Args:
        run: The run.
        logps: What training and evaluations wrote; None if nothing.
        slices: From ``shard_slices``.
        held_out: From :func:`held_out_rows`.
        scratch: See :func:`final_pairs`.

    Raises:
        DataError: The pairs are not those of the shards.
    """
    last = last_logps(run, logps, held_out)
    if last is None:
        return None
    pairs = final_pairs(last, slices, held_out=held_out, scratch=scratch)
    parts = split_pairs(pairs, scored=last.scored, held_out=held_out)
    outcomes = {name: outcome(part, beta=run.beta, noise=run.margin_noise) for name, part in parts.items()}
    splits = {name: found for name, found in outcomes.items() if found is not None}
    if not splits:
        return None
    return FinalState(
        pairs=pairs,
        table=last.table.filter(last.state),
        count=sum(splits[name].pairs for name in ("training", "held-out") if name in splits)
        or splits["all"].pairs,
        scored=last.scored,
        step=last.step,
        label=last.label,
        dtype=last.dtype,
        splits=splits,
    )


def split_pairs(pairs: pl.LazyFrame, *, scored: bool, held_out: pl.Series) -> dict[str, pl.LazyFrame]:
    """The pairs of :func:`final_pairs` as ``all``, ``training`` and ``held-out``, where these are known."""
    parts = {"all": pairs} if scored else {}
    if len(held_out):
        parts["training"] = pairs.filter(~pl.col("held_out"))
        parts["held-out"] = pairs.filter("held_out")
    return parts


def final_pairs(
    last: LastLogps,
    slices: Sequence[ShardSlice],
    *,
    held_out: pl.Series,
    scratch: Path | None = None,
) -> pl.LazyFrame:
    """The final log-probs of each pair with the reference's, in row order.

    Args:
        last: From :func:`last_logps`; a pair that was scored twice is kept once.
        slices: From ``shard_slices``.
        held_out: Row numbers of the pairs that training did not see.
        scratch: An empty folder, where about 120 bytes per pair are written, which stays as long as the pairs
            are used. None keeps them in memory.

    Returns:
        A scan of ``row``, ``prompt`` (a hash of prompt_id), ``source``, ``held_out``, the four log-probs and
        the two lengths.

    Raises:
        DataError: The pairs are not those of the shards.
    """
    parts = []
    divided = by_slice(last.table, slices, scratch and scratch / "rows", state=last.state)
    for number, (part, rows) in enumerate(zip(slices, divided, strict=True)):
        joined = with_reference(rows.select(*_POLICY), part.reference, where=last.where)
        once = each_once(joined.lazy(), held_out=held_out)
        if scratch is None:
            parts.append(once)
        else:
            once.write_parquet(scratch / f"{number:05d}.parquet", compression="uncompressed")
    if scratch is None:
        return pl.concat(parts).lazy()
    return pl.scan_parquet(sorted(scratch.glob("*.parquet")), glob=False)


def each_once(joined: pl.LazyFrame, *, held_out: pl.Series) -> pl.DataFrame:
    """Pairs from ``with_reference`` in row order, each once, and whether training did not see them.

    Args:
        joined: With the columns of :func:`final_pairs`.
        held_out: See :func:`final_pairs`.
    """
    row = pl.col("row")
    return (
        joined.sort("row")
        .filter(row.ne_missing(row.shift()))
        .with_columns(row.is_in(held_out.implode()).alias("held_out"))
        .collect(engine="streaming")
    )
