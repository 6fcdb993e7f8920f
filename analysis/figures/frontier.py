"""Draws reward against KL: a line for each run through its checkpoints.

It draws into ``axes`` if they are given, or else into a figure of its own.
"""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dpo_opt.analysis.figures.drawing import (
    legend_label,
    looks_of_runs,
    new_figure,
    styled,
    with_legend,
)
from dpo_opt.analysis.frontier import FrontierPoint
from dpo_opt.analysis.intervals import FloatArray, Interval


@styled
def frontier_figure(points: Sequence[FrontierPoint], *, axes: Axes | None = None) -> Figure:
    """Mean reward against KL per completion, both with 95% intervals over prompts.

    Args:
        points: At least one, all with rewards of one kind; those of a run next to each other.
        axes: Where to draw.
    """
    # Of equal rewards, the one that moved the policy least.
    best = max(points, key=lambda point: (point.reward.value, -point.kl.value))
    figure, axes = new_figure(
        f"The highest reward, {best.reward.value:.3g}, is at a KL of {best.kl.value:.3g} nats ({best.run})",
        axes,
        x="KL from the reference per completion, nats",
        y="mean reward",
    )
    axes.xaxis.set_major_locator(MaxNLocator(6))
    runs = groupby(points, key=lambda point: point.run)
    for (name, of_run), (colour, marker) in zip(runs, looks_of_runs(), strict=False):
        # The reference itself, at no step and a KL of 0, is where the line of the run beside it begins.
        found = sorted(of_run, key=lambda point: point.step is not None or point.kl.value != 0)
        kl, reward = ([getattr(point, name) for point in found] for name in ("kl", "reward"))
        axes.errorbar(
            [interval.value for interval in kl],
            [interval.value for interval in reward],
            xerr=_lengths(kl),
            yerr=_lengths(reward),
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.2,
            elinewidth=0.8,
            label=legend_label(name),
        )
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    return with_legend(figure, axes)


def _lengths(intervals: Sequence[Interval]) -> FloatArray:
    """(2, points) how far the intervals reach down and up; 0 where one prompt has no interval."""
    reach = [(i.value - i.low, i.high - i.value) for i in intervals]
    found: FloatArray = np.nan_to_num(np.array(reach).T, nan=0.0)
    return found
