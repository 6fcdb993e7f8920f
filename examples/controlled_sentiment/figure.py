"""Draws reward against KL as the paper's figure 2 does: a point for each policy, a line for each frontier."""

from collections.abc import Sequence

import numpy as np
from claims import frontier
from matplotlib.figure import Figure
from points import Point
from settings import TITLES

from dpo_opt.analysis.figures.drawing import baseline, new_figure, styled, with_legend

# Okabe and Ito's palette.
_COLOURS = dict(zip(TITLES, ("#D55E00", "#009E73", "#7b8794", "#56B4E9", "#0072B2", "#CC79A7"), strict=True))
_MARKERS = dict(zip(TITLES, "osD^vP", strict=True))


@styled
def figure(points: Sequence[Point]) -> Figure:
    """Mean ground-truth reward against KL per completion; the lines are means over the repetitions."""
    drawn, axes = new_figure(
        "Reward against KL of every policy", None, x="KL from the reference per completion, nats", y="reward"
    )
    drawn.set_size_inches(6.4, 4.4)
    seeds = sorted({point.seed for point in points})
    start = float(np.mean([p.reward.mean() for p in points if p.method == "sft"]))
    baseline(axes, start, "reference (SFT)")
    for method, title in TITLES.items():
        own = [point for point in points if point.method == method]
        if not own:
            continue
        look = {"color": _COLOURS[method], "marker": _MARKERS[method]}
        axes.scatter(
            [p.kl.mean() for p in own], [p.reward.mean() for p in own], s=14, alpha=0.55, linewidths=0, **look
        )
        levels = np.linspace(0, max(p.kl.mean() for p in own), 64)
        of_seeds = [_frontier(points, method, seed, levels) for seed in seeds]
        axes.plot(levels, np.mean(of_seeds, axis=0), color=_COLOURS[method], linewidth=1.4, label=title)
    axes.set_xlim(left=0)
    return with_legend(drawn, axes)


def _frontier(points: Sequence[Point], method: str, seed: int, levels: np.ndarray) -> np.ndarray:
    own = [p for p in points if p.seed == seed and p.method in ("sft", method)]
    kl, reward = (np.array([getattr(p, name).mean() for p in own]) for name in ("kl", "reward"))
    return frontier(kl, reward, levels)
