"""Draws several runs over one another, aligned by step or by how far each policy is from its reference."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dpo_opt.analysis.figures.drawing import (
    baseline,
    legend_label,
    looks_of_runs,
    new_figure,
    styled,
    with_legend,
)


class RunCurve(NamedTuple):
    """The held-out accuracy of one run at its evaluations."""

    run: str
    at: Sequence[float]
    """Steps, or nats of KL."""
    accuracy: Sequence[float]


@styled
def accuracy_of_runs(curves: Sequence[RunCurve], *, along: str, axes: Axes | None = None) -> Figure:
    """Held-out reward accuracy of every run.

    Args:
        curves: At least one, each with a point or more.
        along: What the horizontal axis is, with its unit.
        axes: Where to draw; None draws a figure of its own.
    """
    best = max(curves, key=lambda curve: np.max(curve.accuracy))
    highest = int(np.argmax(best.accuracy))
    figure, axes = new_figure(
        f"Highest: {best.accuracy[highest]:.0%}, {best.run} at {best.at[highest]:,.3g}",
        axes,
        x=along,
        y="held-out pairs with margin > 0",
    )
    baseline(axes, 0.5, None)
    for curve, (colour, marker) in zip(curves, looks_of_runs(), strict=False):
        order = np.argsort(curve.at)
        axes.plot(
            np.array(curve.at)[order],
            np.array(curve.accuracy)[order],
            color=colour,
            marker=marker,
            markersize=4.5,
            label=legend_label(curve.run),
        )
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return with_legend(figure, axes)
