"""What happened to single pairs over the steps: log-ratios, their spread, quadrants, gradient weights.

metrics.jsonl has only batch means of rewards. The pair table shows, over many pairs, whether the chosen
completions became less likely, what share of them did, and which pairs the gradient came from.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import polars as pl

from dpo_opt.analysis import rewards
from dpo_opt.analysis.quadrants import MOVEMENTS, movement
from dpo_opt.analysis.slices import ShardSlice, by_slice, with_reference
from dpo_opt.schemas.run_layout import PAIR_LOGPS

INTERVALS = 24
"""Training steps are grouped into at most this many equal intervals."""
QUANTILES = {"p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}
SPREAD = ("chosen_logratio", "rejected_logratio", "margin")
"""Of these the quantiles are computed; the margin is that of the log-ratios, without beta."""
_DRAWN = 1_000_000


class Trajectories(NamedTuple):
    """The pairs of training and evaluations against steps."""

    points: pl.DataFrame
    """One row per ``phase`` and point, ordered by ``step`` (mean of the interval's): ``pairs``; means of
    ``chosen_logratio``, ``rejected_logratio`` (nats per completion) and ``chosen_fell`` (share); quantiles
    ``margin_p5`` to ``margin_p95`` and those of the log-ratios; a share ``movement_0`` ... of each of
    ``MOVEMENTS``. Of more than a million rows the quantiles are those of a million, drawn by a hash."""
    drivers: pl.DataFrame
    """The trained pairs with the largest sums of gradient weights: ``row``, ``visits``, ``weight``."""


def trajectories(
    pair_logps: pl.LazyFrame,
    slices: Sequence[ShardSlice],
    *,
    beta: float,
    noise: float = 0.0,
    drivers: int = 0,
    scratch: Path | None = None,
) -> Trajectories:
    """Summarize the log-probs of single pairs over the steps.

    Args:
        pair_logps: From ``scan_pair_logps``; phases train and eval are used.
        slices: From ``shard_slices``.
        beta: The run's beta.
        noise: Log-ratios of at most this size, in nats, have not moved.
        drivers: How many pairs to name as drivers. A visit's weight is sigma(-margin), the factor before
            the pair's gradient (Rafailov et al. 2023, arXiv 2305.18290, section 4): 1/2 at the start, near 1
            for a pair that the policy moves the wrong way, near 0 for one that is learned.
        scratch: See ``by_slice``.

    Raises:
        DataError: The pairs are not those of the shards.
    """
    size = pair_logps.select(pl.col("step").max(), pl.len().alias("rows")).collect(engine="streaming")
    last, rows = size.row(0)
    # Of equal width, so that the last one is not a remainder of a step or two.
    steps = 1 + (last or 0)
    interval = pl.col("step") * min(INTERVALS, steps) // steps
    point = pl.when(pl.col("phase") == "train").then(interval).otherwise("step").alias("point")
    every = -(-rows // _DRAWN) or 1
    sums, some, heaviest = [], [], []
    for part, rows in zip(slices, by_slice(pair_logps, slices, scratch), strict=True):
        pairs = _joined(rows, part, point, noise)
        sums.append(_sums(pairs))
        some.append(
            pairs.filter(pl.struct("row", "step").hash(seed=1) % every == 0).select("phase", "point", *SPREAD)
        )
        if drivers:
            heaviest.append(_heaviest(pairs, beta=beta, count=drivers))
    quantiles = (
        pl.concat(some)
        .group_by("phase", "point")
        .agg(
            pl.col(value).quantile(q, interpolation="linear").alias(f"{value}_{name}")
            for value in SPREAD
            for name, q in QUANTILES.items()
        )
    )
    return Trajectories(
        points=_points(pl.concat(sums))
        .join(quantiles, on=["phase", "point"])
        .drop("point")
        .sort("step", "phase"),
        drivers=pl.concat(heaviest)
        .bottom_k(drivers, by=[-pl.col("weight"), pl.col("row")])
        .sort(-pl.col("weight"), pl.col("row"))
        if heaviest
        else pl.DataFrame(),
    )


def _joined(rows: pl.LazyFrame, part: ShardSlice, point: pl.Expr, noise: float) -> pl.DataFrame:
    chosen, rejected = rewards.chosen_logratio(), rewards.rejected_logratio()
    wanted = rows.select("row", "pair", "phase", "step", "chosen_logps", "rejected_logps")
    reference = part.reference.select("row", "reference_pair", "ref_chosen_logps", "ref_rejected_logps")
    return (
        with_reference(wanted, reference, where=PAIR_LOGPS)
        .filter(pl.col("phase").is_in(["train", "eval"]))
        .select(
            "row",
            "phase",
            "step",
            point,
            chosen.alias("chosen_logratio"),
            rejected.alias("rejected_logratio"),
            (chosen - rejected).alias("margin"),
            rewards.chosen_fell().alias("chosen_fell"),
            movement(noise).alias("movement"),
        )
    )


def _sums(pairs: pl.DataFrame) -> pl.DataFrame:
    return pairs.group_by("phase", "point").agg(
        pl.col("step").cast(pl.Float64).sum(),
        pl.len().cast(pl.Int64).alias("pairs"),
        pl.col("chosen_logratio").sum(),
        pl.col("rejected_logratio").sum(),
        pl.col("chosen_fell").sum().cast(pl.Int64),
        *(
            (pl.col("movement") == i).sum().cast(pl.Int64).alias(f"movement_{i}")
            for i in range(len(MOVEMENTS))
        ),
    )


def _points(sums: pl.DataFrame) -> pl.DataFrame:
    pairs = pl.col("pairs")
    means = ("chosen_logratio", "rejected_logratio", "chosen_fell")
    return (
        sums.group_by("phase", "point")
        .agg(pl.all().sum())
        .select(
            "phase",
            "point",
            pl.col("step") / pairs,
            "pairs",
            *(pl.col(name) / pairs for name in means),
            *(pl.col(f"movement_{i}") / pairs for i in range(len(MOVEMENTS))),
        )
    )


def _heaviest(pairs: pl.DataFrame, *, beta: float, count: int) -> pl.DataFrame:
    weight = 1 / (1 + (beta * pl.col("margin")).exp())
    return (
        pairs.filter((pl.col("phase") == "train") & pl.col("margin").is_finite())
        .group_by("row")
        .agg(pl.len().alias("visits"), weight.sum().alias("weight"))
        .bottom_k(count, by=[-pl.col("weight"), pl.col("row")])
    )
