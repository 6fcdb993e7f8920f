"""Draws how the values of single pairs are spread after training.

Each function draws into ``axes`` if they are given, or else into a figure of its own.
"""

import math
from collections.abc import Sequence

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dpo_opt.analysis import rewards
from dpo_opt.analysis.binned import bin_of, counts, drawn, equal_groups, finite
from dpo_opt.analysis.figures.drawing import (
    CHOSEN,
    HELD_OUT,
    INK,
    MUTED,
    baseline,
    new_figure,
    styled,
    with_legend,
)
from dpo_opt.analysis.intervals import FloatArray

_MAX_BINS = 60
_LENGTH_GROUPS = 12


@styled
def margin_histogram(pairs: pl.LazyFrame | pl.DataFrame, *, axes: Axes | None = None) -> Figure:
    """log p(chosen) - log p(rejected) under the reference and under the final policy.

    Args:
        pairs: From ``final_pairs``. The outermost 2% of each distribution is counted in the edge bars.
    """
    pairs = pairs.lazy()
    before, after = rewards.reference_margin(), rewards.ranking_margin()
    figure, axes = new_figure(
        f"Ranked correctly: {_share_right(pairs, before):.0%} of pairs before, "
        f"{_share_right(pairs, after):.0%} after",
        axes,
        x="log p(chosen) − log p(rejected), in nats",
        y="pairs",
    )
    _histogram(axes, pairs, (before, after), colours=(MUTED, CHOSEN), labels=("reference", "final policy"))
    return with_legend(figure, axes)


@styled
def reward_margin_histogram(
    pairs: pl.LazyFrame | pl.DataFrame, *, beta: float, axes: Axes | None = None
) -> Figure:
    """The final reward margins, all 0 before training.

    Args:
        pairs: From ``final_pairs``. The outermost 2% is counted in the edge bars.
        beta: The run's beta.
    """
    pairs = pairs.lazy()
    margin = rewards.margin(beta=beta)
    figure, axes = new_figure(
        f"Moved the right way: {_share_right(pairs, margin):.0%} of pairs",
        axes,
        x="reward margin (nats)",
        y="pairs",
    )
    _histogram(axes, pairs, (margin,), colours=(HELD_OUT,), labels=(None,))
    return figure


@styled
def margin_by_length(pairs: pl.LazyFrame | pl.DataFrame, *, beta: float, axes: Axes | None = None) -> Figure:
    """Mean reward margin against the length difference of the two completions, in up to 12 equal groups."""
    pairs = pairs.lazy()
    difference = rewards.length_difference()
    edges = equal_groups(finite(drawn(pairs, difference.alias("value"))["value"]), _LENGTH_GROUPS)
    groups = (
        pairs.select(difference=difference, margin=rewards.margin(beta=beta))
        .group_by(bin_of(pl.col("difference").cast(pl.Float64), edges).alias("group"))
        .agg(pl.col("difference").mean(), pl.col("margin").mean())
        .sort("group")
        .collect(engine="streaming")
    )
    span = float(groups["margin"].max() - groups["margin"].min())  # type: ignore[operator, arg-type]
    figure, axes = new_figure(
        f"Between length groups the mean margin varies by {span:.2g}",
        axes,
        x="chosen length − rejected length (tokens)",
        y="mean reward margin (nats)",
    )
    baseline(axes, 0, None)
    axes.plot(groups["difference"], groups["margin"], color=INK, marker="o", markersize=5)
    return figure


def _histogram(
    axes: Axes,
    pairs: pl.LazyFrame,
    values: Sequence[pl.Expr],
    *,
    colours: Sequence[str],
    labels: Sequence[str | None],
) -> None:
    some = drawn(pairs, *(value.alias(str(i)) for i, value in enumerate(values)))
    samples = [finite(some[name]) for name in some.columns]
    edges = _edges(samples)
    for value, colour, label in zip(values, colours, labels, strict=True):
        found = counts(pairs, value, edges)
        axes.stairs(found, edges, fill=True, color=colour, alpha=0.22)
        axes.stairs(found, edges, color=colour, linewidth=1.4, label=label)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.axvline(0, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))


def _edges(samples: Sequence[FloatArray]) -> FloatArray:
    # A few far outliers would squeeze all other values into a few bars.
    outer = [np.quantile(values, [0.01, 0.99]) for values in samples if len(values)]
    low, high = min((q[0] for q in outer), default=0.0), max((q[1] for q in outer), default=0.0)
    bins = int(min(_MAX_BINS, 4 + 2 * math.sqrt(len(samples[0]))))
    return np.linspace(low, max(high, low + 1e-6), bins + 1)


def _share_right(pairs: pl.LazyFrame, margin: pl.Expr) -> float:
    """Of the pairs with a finite margin."""
    found = pairs.select(margin.alias("m")).filter(pl.col("m").is_finite())
    share = found.select((pl.col("m") > 0).mean()).collect(engine="streaming").item()
    return math.nan if share is None else float(share)
