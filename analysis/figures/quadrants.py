"""Draws quadrants: which way completions moved over the steps, and reference margins against trained ones.

Each function draws into ``axes`` if they are given, or else into a figure of its own.
"""

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from dpo_opt.analysis.figures.drawing import (
    ALARMING,
    BENIGN,
    CHOSEN,
    INK,
    REJECTED,
    new_figure,
    styled,
    with_legend,
)
from dpo_opt.analysis.quadrants import MOVEMENTS, MarginGrid


@styled
def movement_areas(points: pl.DataFrame, *, axes: Axes | None = None) -> Figure:
    """Shares of the pairs in each movement against steps: benign ones below the line, alarming ones above.

    Args:
        points: Of ``Trajectories``. Evaluations are drawn where there are two or more, else training.
    """
    evals = points.filter(pl.col("phase") == "eval")
    shown = evals if len(evals) > 1 else points.filter(pl.col("phase") == "train")
    shares = [shown[f"movement_{i}"].to_numpy() for i in range(len(MOVEMENTS))]
    total = np.maximum(np.sum(shares, axis=0), 1e-12)
    alarming = sum(s[-1] for s, m in zip(shares, MOVEMENTS, strict=True) if m.alarming) / total[-1]
    steps = shown["step"].to_numpy()
    which = "held-out" if len(evals) > 1 else "training"
    figure, axes = new_figure(
        f"Alarming at the end: {alarming:.0%} of {which} pairs", axes, y="share of pairs"
    )
    lower = np.zeros(len(shown))
    colours = iter([*BENIGN, *ALARMING])
    for share, movement in zip(shares, MOVEMENTS, strict=True):
        upper = lower + share / total
        colour = next(colours)
        axes.fill_between(steps, lower, upper, color=colour, linewidth=0, label=movement.name)
        lower = upper
    benign = np.sum([s for s, m in zip(shares, MOVEMENTS, strict=True) if not m.alarming], axis=0) / total
    axes.plot(steps, benign, color=INK, linewidth=2, label="above: alarming")
    axes.set_ylim(0, 1)
    axes.margins(x=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return with_legend(figure, axes)


@styled
def margin_map(grid: MarginGrid, *, axes: Axes | None = None) -> Figure:
    """Reference margin against trained margin: a dot per cell, its area the number of pairs."""
    centres = (grid.edges[1:] + grid.edges[:-1]) / 2
    before, after = np.nonzero(grid.counts)
    count = grid.counts[before, after]
    right = (centres[after] > 0) & (centres[before] < 0)
    wrong = (centres[after] < 0) & (centres[before] > 0)
    total = max(grid.counts.sum(), 1)
    figure, axes = new_figure(
        f"Turned right: {count[right].sum() / total:.0%}; turned wrong: {count[wrong].sum() / total:.0%}",
        axes,
        x="reference: log p(chosen) − log p(rejected), nats",
        y="final policy (nats)",
    )
    reach = grid.edges[-1]
    axes.plot([-reach, reach], [-reach, reach], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.axvline(0, color=INK, linewidth=0.8)
    area = 14 + 120 * count / max(count.max(initial=1), 1)
    for picked, colour, marker, label in (
        (~(right | wrong), INK, "o", "ranking unchanged"),
        (right, CHOSEN, "^", "turned right"),
        (wrong, REJECTED, "v", "turned wrong"),
    ):
        if not picked.any():
            continue  # its mark in the legend would be a dot without an area
        x, y = centres[before[picked]], centres[after[picked]]
        axes.scatter(x, y, s=area[picked], color=colour, marker=marker, alpha=0.6, linewidths=0, label=label)
    return with_legend(figure, axes)
