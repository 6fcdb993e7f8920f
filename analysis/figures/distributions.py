"""Draws how the values of single pairs are spread after training."""

import math
from collections.abc import Sequence

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dpo_opt.analysis import rewards
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
def margin_histogram(pairs: pl.DataFrame) -> Figure:
    """log p(chosen) - log p(rejected) under the reference and under the final policy.

    Args:
        pairs: From ``final_pairs``. The outermost 2% of each distribution is counted in the edge bars.
    """
    before = _finite(pairs, rewards.reference_ranking_margin())
    after = _finite(pairs, rewards.ranking_margin())
    figure, axes = new_figure(
        f"Ranked correctly: {_share_right(before):.0%} of pairs before, {_share_right(after):.0%} after",
        x="log p(chosen) − log p(rejected), in nats",
        y="pairs",
    )
    _histogram(axes, (before, after), colours=(MUTED, CHOSEN), labels=("reference", "final policy"))
    return with_legend(figure, axes)


@styled
def reward_margin_histogram(pairs: pl.DataFrame, *, beta: float) -> Figure:
    """The final reward margins, all 0 before training.

    Args:
        pairs: From ``final_pairs``. The outermost 2% is counted in the edge bars.
        beta: The run's beta.
    """
    margins = _finite(pairs, rewards.margin(beta=beta))
    figure, axes = new_figure(
        f"Moved the right way: {_share_right(margins):.0%} of pairs", x="reward margin (nats)", y="pairs"
    )
    _histogram(axes, (margins,), colours=(HELD_OUT,), labels=(None,))
    return figure


@styled
def margin_by_length(pairs: pl.DataFrame, *, beta: float) -> Figure:
    """Mean reward margin against the length difference of the two completions, in up to 12 equal groups."""
    values = pairs.select(difference=rewards.length_difference(), margin=rewards.margin(beta=beta))
    difference = values["difference"].to_numpy()
    edges = np.unique(np.quantile(difference, np.linspace(0, 1, _LENGTH_GROUPS + 1)[1:-1]))
    groups = (
        values.with_columns(group=np.searchsorted(edges, difference, side="right"))
        .group_by("group")
        .agg(pl.col("difference").mean(), pl.col("margin").mean())
        .sort("group")
    )
    span = float(groups["margin"].max() - groups["margin"].min())  # type: ignore[operator, arg-type]
    figure, axes = new_figure(
        f"Between length groups the mean margin varies by {span:.2g}",
        x="chosen length − rejected length (tokens)",
        y="mean reward margin (nats)",
    )
    baseline(axes, 0, None)
    axes.plot(groups["difference"], groups["margin"], color=INK, marker="o", markersize=5)
    return figure


def _histogram(
    axes: Axes, samples: Sequence[FloatArray], *, colours: Sequence[str], labels: Sequence[str | None]
) -> None:
    # A few far outliers would squeeze all other values into a few bars.
    outer = [np.quantile(values, [0.01, 0.99]) for values in samples if len(values)]
    low, high = min((q[0] for q in outer), default=0.0), max((q[1] for q in outer), default=0.0)
    bins = int(min(_MAX_BINS, 4 + 2 * math.sqrt(len(samples[0]))))
    edges = np.linspace(low, max(high, low + 1e-6), bins + 1)
    for values, colour, label in zip(samples, colours, labels, strict=True):
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)
        axes.stairs(counts, edges, fill=True, color=colour, alpha=0.22)
        axes.stairs(counts, edges, color=colour, linewidth=1.4, label=label)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.axvline(0, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))


def _finite(pairs: pl.DataFrame, value: pl.Expr) -> FloatArray:
    values: FloatArray = pairs.select(value.alias("value"))["value"].to_numpy()
    finite: FloatArray = values[np.isfinite(values)]
    return finite


def _share_right(margins: FloatArray) -> float:
    return float((margins > 0).mean()) if len(margins) else math.nan
