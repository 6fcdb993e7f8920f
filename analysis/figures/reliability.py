"""Draws whether the probabilities that the implicit reward states come true.

Each function draws into ``axes`` if they are given, or else into a figure of its own.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dpo_opt.analysis.calibration import Calibration
from dpo_opt.analysis.figures.drawing import HELD_OUT, MUTED, new_figure, styled, with_legend


@styled
def reliability_diagram(found: Calibration, *, axes: Axes | None = None) -> Figure:
    """Accuracy against stated confidence, group by group, with intervals over prompts."""
    sure = found.confidence - found.accuracy
    fact = "Too sure" if sure > 0 else "Not sure enough"
    figure, axes = new_figure(
        f"{fact}: states {found.confidence:.0%}, right in {found.accuracy:.0%}",
        axes,
        x="stated probability, σ(|margin|)",
        y="share ranked as labelled",
    )
    confidence = np.array([group.confidence for group in found.groups])
    accuracy = np.array([group.accuracy.value for group in found.groups])
    bounds = np.array([[group.accuracy.low, group.accuracy.high] for group in found.groups]).T
    low, high = min(0.5, float(confidence.min())), 1.0
    axes.plot([low, high], [low, high], color=MUTED, linestyle=(0, (4, 3)), label="calibrated")
    axes.errorbar(
        confidence,
        accuracy,
        yerr=np.abs(bounds - accuracy),
        color=HELD_OUT,
        marker="o",
        markersize=5,
        linewidth=1.2,
        label="pairs in ten groups, with 95% intervals",
    )
    axes.set_xlim(low, max(float(confidence.max()) + 0.02, 0.6))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    return with_legend(figure, axes)
