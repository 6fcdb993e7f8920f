"""Sorts pairs into quadrants: which way training moved both completions, and what it did to the ranking.

A fall of both log-probs is usual for DPO and no fault by itself. What the chosen completion loses while the
pair gains little is likelihood displacement (Razin et al. 2024, arXiv 2410.08847), so quadrants are divided.
"""

from typing import NamedTuple

import numpy as np
import polars as pl

from dpo_opt.analysis import rewards
from dpo_opt.analysis.binned import bin_of, drawn, finite
from dpo_opt.analysis.intervals import FloatArray

EXAMPLES = 5
_CELLS = 24


class Movement(NamedTuple):
    """Where the two log-ratios of a pair may lie."""

    name: str
    meaning: str
    alarming: bool


UNMOVED = Movement("unmoved", "both log-ratios are of the size of rounding", False)
MOVEMENTS = (
    Movement("chosen up, rejected down", "what the pairs ask for", False),
    Movement("both up, chosen more", "the margin grew", False),
    Movement("both down, gaining", "the margin gained more nats than the chosen completion lost", False),
    UNMOVED,
    Movement("both up, rejected more", "the wrong completion gained more", True),
    Movement(
        "both down, losing", "the chosen completion lost at least as many nats as the margin gained", True
    ),
    Movement("chosen down, rejected up", "the reverse of what the pairs ask for", True),
)
"""Benign ones first. Together they are all pairs with finite log-ratios, each in one."""

RANKINGS = ("stayed right", "turned right", "turned wrong", "stayed wrong")
"""Of reference and policy: whether the chosen completion is the likelier one of the two."""


class RankingQuadrant(NamedTuple):
    """The pairs whose ranking did one of four things."""

    name: str
    pairs: int
    share: float
    mean_margin: float | None
    """Of the rewards; None without pairs."""
    examples: list[int]
    """Rows of the pairs whose ranking margin changed most."""


def movement(noise: float) -> pl.Expr:
    """Number of a pair's movement in :data:`MOVEMENTS`; null where a log-ratio is not finite.

    Args:
        noise: Log-ratios of at most this size, in nats, have not moved.
    """
    chosen, rejected = rewards.chosen_logratio(), rewards.rejected_logratio()
    margin = chosen - rejected
    return (
        pl.when(~(chosen.is_finite() & rejected.is_finite()))
        .then(None)
        .when((chosen.abs() <= noise) & (rejected.abs() <= noise))
        .then(3)
        .when((chosen >= 0) & (rejected < 0))
        .then(0)
        .when((chosen >= 0) & (margin > 0))
        .then(1)
        .when(chosen >= 0)
        .then(4)
        .when(rejected >= 0)
        .then(6)
        .when(margin > -chosen)
        .then(2)
        .otherwise(5)
        .cast(pl.Int32)
    )


def movement_shares(pairs: pl.LazyFrame, *, noise: float) -> dict[str, float]:
    """Share of the pairs by the name of their movement."""
    table = pairs.group_by(movement(noise).alias("movement")).len().collect(engine="streaming")
    found = dict(table.drop_nulls().iter_rows())
    total = sum(found.values())
    return {m.name: found.get(i, 0) / total if total else float("nan") for i, m in enumerate(MOVEMENTS)}


def ranking_quadrant() -> pl.Expr:
    """Number of a pair's quadrant in :data:`RANKINGS`."""
    before, after = rewards.reference_ranking_accuracy(), rewards.ranking_accuracy()
    return (
        pl.when(before & after).then(0).when(after).then(1).when(before).then(2).otherwise(3).cast(pl.Int32)
    )


def ranking_quadrants(pairs: pl.LazyFrame, *, beta: float) -> list[RankingQuadrant]:
    """The four quadrants of reference margin against trained margin, in the order of :data:`RANKINGS`."""
    change = rewards.chosen_logratio() - rewards.rejected_logratio()
    table = (
        pairs.group_by(ranking_quadrant().alias("quadrant"))
        .agg(pl.len(), rewards.margin(beta=beta).mean().alias("margin"))
        .collect(engine="streaming")
        .rows_by_key("quadrant", unique=True)
    )
    total = sum(row[0] for row in table.values())
    found = []
    for number, name in enumerate(RANKINGS):
        count, margin = table.get(number, (0, None))
        most = (
            pairs.filter(ranking_quadrant() == number)
            .select("row", change=change.abs())
            .bottom_k(EXAMPLES, by=[-pl.col("change"), pl.col("row")])
            .sort(-pl.col("change"), pl.col("row"))
            .collect(engine="streaming")
        )
        found.append(RankingQuadrant(name, count, count / total, margin, most["row"].to_list()))
    return found


class MarginGrid(NamedTuple):
    """Pairs counted by reference margin and trained margin; the outermost cells hold those beyond."""

    edges: FloatArray
    """(C + 1,) In nats, the same for both margins, with 0 on an edge."""
    counts: FloatArray
    """(C, C) By reference margin, then trained margin."""


def margin_grid(pairs: pl.LazyFrame) -> MarginGrid:
    """Count pairs on a grid that reaches to the 95th percentile of both margins' size."""
    before, after = rewards.reference_margin(), rewards.ranking_margin()
    some = drawn(pairs, before.alias("before"), after.alias("after"))
    sizes = np.abs(np.concatenate([finite(some["before"]), finite(some["after"])]))
    reach = float(np.quantile(sizes, 0.95)) if len(sizes) else 1.0
    edges = np.linspace(-1, 1, _CELLS + 1) * max(reach, 1e-6)
    table = (
        pairs.select(before.alias("before"), after.alias("after"))
        .filter(pl.all_horizontal(pl.all().is_finite()))
        .group_by(before=bin_of(pl.col("before"), edges[1:-1]), after=bin_of(pl.col("after"), edges[1:-1]))
        .len()
        .collect(engine="streaming")
    )
    counts = np.zeros((_CELLS, _CELLS))
    counts[table["before"].to_numpy(), table["after"].to_numpy()] = table["len"].to_numpy()
    return MarginGrid(edges, counts)
