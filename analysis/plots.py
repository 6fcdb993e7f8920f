"""Draws the report's figures with matplotlib, readable in print and by colour-blind readers.

Titles state the fact that is shown, and axes have units. Held-out and training lines differ in their marks,
not only in colour. No function here touches files or pyplot's global figures.
"""

import functools
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dpo_opt.analysis import rewards
from dpo_opt.analysis.intervals import FloatArray

# Okabe and Ito's palette: its colours stay distinct with the common colour deficiencies.
_CHOSEN = "#0072B2"
_REJECTED = "#D55E00"
_HELD_OUT = "#009E73"
_INK = "#1f2933"
_MUTED = "#7b8794"
_GRID = "#e4e7eb"

_STYLE: Any = {  # matplotlib types each key as a literal
    "axes.axisbelow": True,
    "axes.edgecolor": _MUTED,
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 9,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",  # text stays text: it can be searched, copied and read aloud
    "svg.hashsalt": "dpo-opt",  # equal figures are equal bytes
    "text.color": _INK,
    "text.parse_math": False,  # names come from folders, and a $ in one is no formula
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
}

_SIZE = (6.0, 3.4)
_LINE_POINTS = 24
_MAX_BINS = 60
_LENGTH_GROUPS = 12

P = ParamSpec("P")


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


def svg(figure: Figure, *, label: str) -> str:
    """The figure as one inline ``<svg>`` element without ids, scripts or outside references.

    Args:
        figure: A figure from this module.
        label: Plain text that a screen reader reads in its place.
    """
    text = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing)
    body = text.getvalue()
    body = body[body.index("<svg") :].strip()
    # Several figures share a page: ids would repeat, and each figure's style would apply to all of them.
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r"<style type=.*?</style>", "", body, flags=re.DOTALL)
    safe = re.sub(r'[&<>"]', " ", label)
    return body.replace("<svg", f'<svg role="img" aria-label="{safe}"', 1)


@_styled
def loss_curve(train: pl.DataFrame, evals: pl.DataFrame, *, untrained: float | None) -> Figure:
    """Loss against steps.

    Args:
        train: ``step`` and ``loss``.
        evals: ``step`` and ``eval_loss``; may be empty.
        untrained: The loss of a policy equal to its reference; None if that is not one number.
    """
    last, which = _result(train, evals, "loss")
    first, _ = _ends(train, "loss")
    figure, axes = _figure(f"Loss ends at {last:.3g}, {which} (first logged: {first:.3g})", y="loss (nats)")
    if untrained is not None:
        _baseline(axes, untrained, f"policy = reference ({untrained:.3f})")
    _line(axes, train, "loss", _INK, "training")
    _points(axes, evals, "eval_loss", _HELD_OUT, "held-out")
    return _legend(figure, axes)


@_styled
def reward_curves(train: pl.DataFrame, evals: pl.DataFrame) -> Figure:
    """Implicit rewards of chosen and rejected against steps; columns as training logs them."""
    chosen, which = _result(train, evals, "rewards/chosen")
    rejected, _ = _result(train, evals, "rewards/rejected")
    figure, axes = _figure(
        f"Rewards end at {_signed(chosen)} (chosen) and {_signed(rejected)} (rejected), {which}",
        y="implicit reward (nats)",
    )
    _both_sides(axes, train, evals, "rewards/{side}", "eval_rewards/{side}")
    return _legend(figure, axes)


@_styled
def margin_curve(train: pl.DataFrame, evals: pl.DataFrame) -> Figure:
    """Reward margin against steps."""
    margin, which = _result(train, evals, "rewards/margins")
    figure, axes = _figure(f"The margin ends at {_signed(margin)}, {which}", y="reward margin (nats)")
    _baseline(axes, 0, None)
    _line(axes, train, "rewards/margins", _INK, "training")
    _points(axes, evals, "eval_rewards/margins", _HELD_OUT, "held-out")
    return _legend(figure, axes)


@_styled
def accuracy_curve(train: pl.DataFrame, evals: pl.DataFrame, *, reference: float | None) -> Figure:
    """Reward accuracy against steps, with the share of pairs that the reference alone ranks correctly."""
    accuracy, which = _result(train, evals, "rewards/accuracies")
    figure, axes = _figure(f"Accuracy ends at {accuracy:.0%}, {which}", y="pairs with margin > 0")
    _baseline(axes, 0.5, None)
    if reference is not None:
        _baseline(axes, reference, f"reference ranks {reference:.0%} correctly", dashes=(5, 2))
    _line(axes, train, "rewards/accuracies", _INK, "training")
    _points(axes, evals, "eval_rewards/accuracies", _HELD_OUT, "held-out")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return _legend(figure, axes)


@_styled
def logratio_curves(trajectories: pl.DataFrame) -> Figure:
    """Mean log-ratios of both sides against steps, from ``logratio_trajectories``."""
    train = trajectories.filter(pl.col("phase") == "train")
    evals = trajectories.filter(pl.col("phase") == "eval")
    shown = evals if len(evals) else train
    chosen, rejected = _ends(shown, "chosen_logratio")[1], _ends(shown, "rejected_logratio")[1]
    down, up = max(chosen, rejected) < 0, min(chosen, rejected) > 0
    fact = "Both went down" if down else "Both went up" if up else "Mean log-ratios"
    figure, axes = _figure(
        f"{fact}: chosen {_signed(chosen)}, rejected {_signed(rejected)} nats",
        y="mean log-ratio (nats per completion)",
    )
    _both_sides(axes, train, evals, "{side}_logratio", "{side}_logratio")
    return _legend(figure, axes)


@_styled
def margin_histogram(pairs: pl.DataFrame) -> Figure:
    """log p(chosen) - log p(rejected) under the reference and under the final policy.

    Args:
        pairs: From ``final_pairs``. The outermost 2% of each distribution is counted in the edge bars.
    """
    before = _finite(pairs, rewards.reference_ranking_margin())
    after = _finite(pairs, rewards.ranking_margin())
    figure, axes = _figure(
        f"Ranked correctly: {_share_right(before):.0%} of pairs before, {_share_right(after):.0%} after",
        x="log p(chosen) − log p(rejected), in nats",
        y="pairs",
    )
    _histogram(axes, (before, after), colours=(_MUTED, _CHOSEN), labels=("reference", "final policy"))
    return _legend(figure, axes)


@_styled
def reward_margin_histogram(pairs: pl.DataFrame, *, beta: float) -> Figure:
    """The final reward margins, all 0 before training.

    Args:
        pairs: From ``final_pairs``. The outermost 2% is counted in the edge bars.
        beta: The run's beta.
    """
    margins = _finite(pairs, rewards.margin(beta=beta))
    figure, axes = _figure(
        f"Moved the right way: {_share_right(margins):.0%} of pairs", x="reward margin (nats)", y="pairs"
    )
    _histogram(axes, (margins,), colours=(_HELD_OUT,), labels=(None,))
    return figure


@_styled
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
    figure, axes = _figure(
        f"Between length groups the mean margin varies by {span:.2g}",
        x="chosen length − rejected length (tokens)",
        y="mean reward margin (nats)",
    )
    _baseline(axes, 0, None)
    axes.plot(groups["difference"], groups["margin"], color=_INK, marker="o", markersize=5)
    return figure


def smoothed(train: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
    """Means over equal intervals of logged steps: at most 24 points for a run of any length."""
    width = -(-len(train) // _LINE_POINTS)
    return (
        train.with_row_index("interval")
        .group_by(pl.col("interval") // max(width, 1))
        .agg(pl.col("step", *columns).mean())
        .sort("interval")
    )


def _figure(title: str, *, y: str, x: str = "step (optimizer updates)") -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis="x", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    return figure, axes


def _legend(figure: Figure, axes: Axes) -> Figure:
    # Below the axes, where it covers no data.
    if entries := len(axes.get_legend_handles_labels()[1]):
        figure.legend(loc="outside lower left", ncols=2 if entries == 4 else 3)
    return figure


def _line(axes: Axes, train: pl.DataFrame, column: str, colour: str, label: str) -> None:
    if column not in train.columns or not len(train):
        return
    line = smoothed(train, [column])
    if len(line) < len(train):
        axes.plot(train["step"], train[column], color=colour, linewidth=0.6, alpha=0.25)
    # A single point needs a marker, because it has no line.
    marker = "o" if len(line) == 1 else ""
    axes.plot(line["step"], line[column], color=colour, label=label, marker=marker)


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


def _both_sides(axes: Axes, train: pl.DataFrame, evals: pl.DataFrame, column: str, eval_column: str) -> None:
    """Chosen and rejected against steps; ``{side}`` in a column's name is replaced by each of them."""
    _baseline(axes, 0, None)
    for side, colour in (("chosen", _CHOSEN), ("rejected", _REJECTED)):
        _line(axes, train, column.format(side=side), colour, f"{side}, training")
        _points(axes, evals, eval_column.format(side=side), colour, f"{side}, held-out")


def _baseline(axes: Axes, y: float, label: str | None, *, dashes: tuple[int, int] = (1, 2)) -> None:
    axes.axhline(y, color=_MUTED, linewidth=1.1, linestyle=(0, dashes), label=label, zorder=1)


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
    axes.axvline(0, color=_INK, linewidth=0.8, linestyle=(0, (2, 2)))


def _finite(pairs: pl.DataFrame, value: pl.Expr) -> FloatArray:
    values: FloatArray = pairs.select(value.alias("value"))["value"].to_numpy()
    finite: FloatArray = values[np.isfinite(values)]
    return finite


def _share_right(margins: FloatArray) -> float:
    return float((margins > 0).mean()) if len(margins) else math.nan


def _result(train: pl.DataFrame, evals: pl.DataFrame, column: str) -> tuple[float, str]:
    """The last value of a metric, held-out if there are evaluations, and the words for which it is."""
    if f"eval_{column}" in evals.columns:
        return _ends(evals, f"eval_{column}")[1], "held-out"
    return _ends(train, column)[1], "in training"


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−")


def _ends(frame: pl.DataFrame, column: str) -> tuple[float, float]:
    """First and last logged value; NaN if there is none."""
    values = frame[column].drop_nulls() if column in frame.columns else pl.Series([], dtype=pl.Float64)
    return (float(values[0]), float(values[-1])) if len(values) else (math.nan, math.nan)
