"""Mean log-ratios of chosen and rejected over the training steps, from the log-probs of single pairs.

metrics.jsonl has only batch means of rewards. The pair table shows, over many pairs, whether the chosen
completions became less likely, and what share of them did.
"""

from collections.abc import Sequence

import polars as pl

from dpo_opt.analysis import rewards
from dpo_opt.analysis.load import ShardSlice, join_reference

INTERVALS = 24
"""Training steps are grouped into at most this many equal intervals."""


def logratio_trajectories(pair_logps: pl.LazyFrame, slices: Sequence[ShardSlice]) -> pl.DataFrame:
    """Mean log-ratios against steps, one row per phase and point.

    Args:
        pair_logps: From ``scan_pair_logps``; phases train and eval are used.
        slices: From ``shard_slices``.

    Returns:
        ``phase``, ``step`` (mean of the interval's), ``pairs``, ``chosen_logratio``,
        ``rejected_logratio`` (nats per completion) and ``chosen_fell`` (share), ordered by step.

    Raises:
        DataError: The pairs are not those of the shards.
    """
    last = pair_logps.select(pl.col("step").max()).collect(engine="streaming").item()
    # Of equal width, so that the last one is not a remainder of a step or two.
    steps = 1 + (last or 0)
    interval = pl.col("step") * min(INTERVALS, steps) // steps
    point = pl.when(pl.col("phase") == "train").then(interval).otherwise("step").alias("point")
    sums = [_sums(join_reference(pair_logps.filter(s.rows), s.shards), point) for s in slices]
    pairs = pl.col("pairs")
    return (
        pl.concat(sums)
        .group_by("phase", "point")
        .agg(pl.all().sum())
        .select(
            "phase",
            pl.col("step") / pairs,
            "pairs",
            *(pl.col(name) / pairs for name in ("chosen_logratio", "rejected_logratio", "chosen_fell")),
        )
        .sort("step", "phase")
    )


def _sums(joined: pl.LazyFrame, point: pl.Expr) -> pl.DataFrame:
    return (
        joined.filter(pl.col("phase").is_in(["train", "eval"]))
        .group_by("phase", point)
        .agg(
            pl.col("step").cast(pl.Float64).sum(),
            pl.len().cast(pl.Int64).alias("pairs"),
            rewards.chosen_logratio().sum().alias("chosen_logratio"),
            rewards.rejected_logratio().sum().alias("rejected_logratio"),
            rewards.chosen_fell().sum().cast(pl.Int64).alias("chosen_fell"),
        )
        .collect(engine="streaming")
    )
