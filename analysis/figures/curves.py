"""Draws what training logged against its steps.

Titles state the fact that is shown, and axes have units. Held-out and training lines differ in their marks,
not only in colour. Each function draws into ``axes`` if they are given, or else into a figure of its own.
"""

import math
from collections.abc import Sequence

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from dpo_opt.analysis.figures.drawing import (
    CHOSEN,
    HELD_OUT,
    INK,
    REJECTED,
    baseline,
    new_figure,
    signed,
    styled,
    with_legend,
)

_LINE_POINTS = 24


@styled
def loss_curve(
    train: pl.DataFrame, evals: pl.DataFrame, *, untrained: float | None, axes: Axes | None = None
) -> Figure:
    """Loss against steps.

    Args:
        train: ``step`` and ``loss``.
        evals: ``step`` and ``eval_loss``; may be empty.
        untrained: The loss of a policy equal to its reference; None if that is not one number.
    """
    first, last, which = _first_and_last(train, evals, "loss")
    begun = "" if first == last else f" (first: {first:.3g})"  # a single evaluation is its own first
    figure, axes = new_figure(f"Loss ends at {last:.3g}, {which}{begun}", axes, y="loss (nats)")
    if untrained is not None:
        baseline(axes, untrained, f"policy = reference ({untrained:.3f})")
    _line(axes, train, "loss", INK, "training")
    _points(axes, evals, "eval_loss", HELD_OUT, "held-out")
    return with_legend(figure, axes)


@styled
def reward_curves(
    train: pl.DataFrame,
    evals: pl.DataFrame,
    points: pl.DataFrame | None = None,
    *,
    beta: float = 1.0,
    axes: Axes | None = None,
) -> Figure:
    """Implicit rewards of chosen and rejected against steps; columns as training logs them.

    Args:
        train: Logged values of training.
        evals: Those of evaluations.
        points: Of ``Trajectories``, for ribbons from the 25th to the 75th percentile of the pairs.
        beta: The run's beta, for the ribbons.
    """
    _, chosen, which = _first_and_last(train, evals, "rewards/chosen")
    _, rejected, _ = _first_and_last(train, evals, "rewards/rejected")
    figure, axes = new_figure(
        f"Rewards end at {signed(chosen)} (chosen) and {signed(rejected)} (rejected), {which}",
        axes,
        y="implicit reward (nats)",
    )
    _ribbons(axes, points, "chosen_logratio", CHOSEN, beta=beta, wide=False)
    _ribbons(axes, points, "rejected_logratio", REJECTED, beta=beta, wide=False)
    _both_sides(axes, train, evals, "rewards/{side}", "eval_rewards/{side}")
    return with_legend(figure, axes)


@styled
def margin_curve(
    train: pl.DataFrame,
    evals: pl.DataFrame,
    points: pl.DataFrame | None = None,
    *,
    beta: float = 1.0,
    axes: Axes | None = None,
) -> Figure:
    """Reward margin against steps, with ribbons of the pairs' 5th to 95th and 25th to 75th percentile.

    Args: see :func:`reward_curves`.
    """
    _, margin, which = _first_and_last(train, evals, "rewards/margins")
    figure, axes = new_figure(f"The margin ends at {signed(margin)}, {which}", axes, y="reward margin (nats)")
    baseline(axes, 0, None)
    _ribbons(axes, points, "margin", HELD_OUT, beta=beta, wide=True)
    _line(axes, train, "rewards/margins", INK, "training")
    _points(axes, evals, "eval_rewards/margins", HELD_OUT, "held-out")
    return with_legend(figure, axes)


@styled
def accuracy_curve(
    train: pl.DataFrame, evals: pl.DataFrame, *, reference: float | None, axes: Axes | None = None
) -> Figure:
    """Reward accuracy against steps, with the share of pairs that the reference alone ranks correctly."""
    _, accuracy, which = _first_and_last(train, evals, "rewards/accuracies")
    figure, axes = new_figure(f"Accuracy ends at {accuracy:.0%}, {which}", axes, y="pairs with margin > 0")
    baseline(axes, 0.5, None)
    if reference is not None:
        baseline(axes, reference, f"reference ranks {reference:.0%} correctly", dashes=(5, 2))
    _line(axes, train, "rewards/accuracies", INK, "training")
    _points(axes, evals, "eval_rewards/accuracies", HELD_OUT, "held-out")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return with_legend(figure, axes)


@styled
def logratio_curves(trajectories: pl.DataFrame, *, axes: Axes | None = None) -> Figure:
    """Mean log-ratios of both sides against steps, from ``logratio_trajectories``."""
    train = trajectories.filter(pl.col("phase") == "train")
    evals = trajectories.filter(pl.col("phase") == "eval")
    shown = evals if len(evals) else train
    chosen, rejected = _ends(shown, "chosen_logratio")[1], _ends(shown, "rejected_logratio")[1]
    down, up = max(chosen, rejected) < 0, min(chosen, rejected) > 0
    fact = "Both went down" if down else "Both went up" if up else "Mean log-ratios"
    figure, axes = new_figure(
        f"{fact}: chosen {signed(chosen)}, rejected {signed(rejected)} nats",
        axes,
        y="mean log-ratio (nats per completion)",
    )
    _both_sides(axes, train, evals, "{side}_logratio", "{side}_logratio")
    return with_legend(figure, axes)


@styled
def update_curves(train: pl.DataFrame, *, axes: Axes | None = None) -> Figure:
    """Gradient norm and learning rate against steps; both are logged by training."""
    norms = train["grad_norm"].drop_nulls().to_numpy()
    figure, axes = new_figure(
        f"The gradient norm is {np.median(norms):.3g} at the median, {norms.max():.3g} at most",
        axes,
        y="gradient norm, before clipping",
    )
    _line(axes, train, "grad_norm", INK, "gradient norm")
    if "learning_rate" in train.columns:
        right = axes.twinx()
        right.set_ylabel("learning rate")
        right.grid(visible=False)
        right.spines["right"].set_visible(True)
        right.plot(
            train["step"], train["learning_rate"], color=HELD_OUT, linestyle=(0, (3, 2)), linewidth=1.2
        )
        # A legend lists the labels of one pair of axes.
        axes.plot([], [], color=HELD_OUT, linestyle=(0, (3, 2)), linewidth=1.2, label="learning rate (right)")
    return with_legend(figure, axes)


def smoothed(train: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
    """Means over about equal intervals of steps: at most 24 points for a run of any length.

    Each logged value is the mean since the one before and counts for that many steps. The last one often
    covers fewer than the others, so an interval is at least as long as the longest of them.
    """
    if not len(train):
        return train.select("step", *columns)
    steps = train["step"].to_numpy()
    covered = np.diff(steps, prepend=0).clip(1)
    points = max(1, min(_LINE_POINTS, int(steps[-1] // covered.max())))
    interval = (steps - 1).clip(0) * points // max(int(steps[-1]), 1)
    weight = pl.col("covered")
    means = (
        (pl.col(name) * weight).sum() / weight.filter(pl.col(name).is_not_null()).sum()
        for name in ("step", *columns)
    )
    return (
        train.select("step", *columns, covered=pl.Series(covered), interval=pl.Series(interval))
        .group_by("interval")
        .agg(mean.alias(name) for name, mean in zip(("step", *columns), means, strict=True))
        .sort("interval")
    )


def _line(axes: Axes, train: pl.DataFrame, column: str, colour: str, label: str) -> None:
    if column not in train.columns or not len(train):
        return
    line = smoothed(train, [column])
    # The mean of two values would be a dot, and their change would not be seen.
    if len(line) == 1:
        line = train
    if len(line) < len(train):
        axes.plot(train["step"], train[column], color=colour, linewidth=0.6, alpha=0.25)
    # A single point needs a marker, because it has no line.
    marker = "o" if len(line) == 1 else ""
    axes.plot(line["step"], line[column], color=colour, label=label, marker=marker, markersize=4)


def _points(axes: Axes, evals: pl.DataFrame, column: str, colour: str, label: str) -> None:
    if column not in evals.columns or not len(evals):
        return
    axes.plot(
        evals["step"],
        evals[column],
        color=colour,
        linewidth=0.9,
        linestyle=(0, (3, 2)),
        marker="o",
        markersize=5.5,
        markeredgecolor="white",
        markeredgewidth=0.8,
        label=label,
    )


def _ribbons(
    axes: Axes, points: pl.DataFrame | None, value: str, colour: str, *, beta: float, wide: bool
) -> None:
    """Percentiles of held-out pairs where they were evaluated twice or more, else of those in training."""
    if points is None:
        return
    evals = points.filter(pl.col("phase") == "eval")
    shown = evals if len(evals) > 1 else points.filter(pl.col("phase") == "train")
    for low, high, alpha in ((("p5", "p95", 0.12),) if wide else ()) + (("p25", "p75", 0.2),):
        axes.fill_between(
            shown["step"].to_numpy(),
            beta * shown[f"{value}_{low}"].to_numpy(),
            beta * shown[f"{value}_{high}"].to_numpy(),
            color=colour,
            alpha=alpha,
            linewidth=0,
        )


def _both_sides(axes: Axes, train: pl.DataFrame, evals: pl.DataFrame, column: str, eval_column: str) -> None:
    """Chosen and rejected against steps; ``{side}`` in a column's name is replaced by each of them."""
    baseline(axes, 0, None)
    for side, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
        _line(axes, train, column.format(side=side), colour, f"{side}, training")
        _points(axes, evals, eval_column.format(side=side), colour, f"{side}, held-out")


def _first_and_last(train: pl.DataFrame, evals: pl.DataFrame, column: str) -> tuple[float, float, str]:
    """A metric's first and last value, held-out if there are evaluations, and the words for which it is.

    Both are of one kind: of the evaluations, or else of the line that is drawn for training.
    """
    if f"eval_{column}" in evals.columns:
        return *_ends(evals, f"eval_{column}"), "held-out"
    line = smoothed(train, [column]) if column in train.columns else train
    # The last value that was logged is another number: that of a few pairs.
    means = ", as means over intervals of steps" if len(line) < len(train) else ""
    return *_ends(line, column), f"in training{means}"


def _ends(frame: pl.DataFrame, column: str) -> tuple[float, float]:
    """First and last logged value; NaN if there is none."""
    values = frame[column].drop_nulls() if column in frame.columns else pl.Series([], dtype=pl.Float64)
    return (float(values[0]), float(values[-1])) if len(values) else (math.nan, math.nan)
