"""How every figure of the report looks: style, colours, axes, and the way into a page as SVG.

Figures are readable in print and by colour-blind readers. No function here touches files or pyplot's global
figures.
"""

import functools
import io
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any, ParamSpec, cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dpo_opt.schemas.safe_text import printable

# Okabe and Ito's palette: its colours stay distinct with the common colour deficiencies.
CHOSEN = "#0072B2"
REJECTED = "#D55E00"
HELD_OUT = "#009E73"
INK = "#1f2933"
MUTED = "#7b8794"
BENIGN = ("#0072B2", "#56B4E9", "#A6CEE3", "#c8ced6")
ALARMING = ("#F0C419", "#D55E00", "#8C2D04")
_LOOKS_OF_RUNS = (CHOSEN, REJECTED, HELD_OUT, INK, MUTED), ("o", "s", "^", "D", "v", "P", "X")
_GRID = "#e4e7eb"
# In a page these follow its colours, light or dark; the others are readable on both.
_NAMED = {
    INK: "ink",
    MUTED: "muted",
    _GRID: "line",
    CHOSEN: "chosen",
    REJECTED: "rejected",
    HELD_OUT: "held-out",
}

_STYLE: Any = {  # matplotlib types each key as a literal
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.labelcolor": INK,
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
    "text.color": INK,
    "text.parse_math": False,  # names come from folders, and a $ in one is no formula
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
}

# Small, so that text is as large on the screen of a phone as it is in print.
_SIZE = (4.2, 3.1)
_TITLE_CHARACTERS = 36

P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Let a function draw in the report's style; its name and docstring stay."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


def svg(figure: Figure, *, label: str) -> str:
    """The figure as one inline ``<svg>`` element without ids, scripts or outside references.

    Args:
        figure: A figure that a :func:`styled` function drew.
        label: Plain text that a screen reader reads in its place.
    """
    text = io.StringIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # The reader's fonts draw the text, not matplotlib's.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing)
    body = text.getvalue()
    body = body[body.index("<svg") :].strip()
    # Several figures share a page: ids would repeat, and each figure's style would apply to all of them.
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r"<style type=.*?</style>", "", body, flags=re.DOTALL)
    for colour, name in _NAMED.items():
        body = body.replace(colour.lower(), f"var(--{name}, {colour.lower()})")
    safe = re.sub(r'[&<>"]', " ", label)
    # Names come from folders: with a control character in one the file would be no XML.
    return printable(body.replace("<svg", f'<svg role="img" aria-label="{safe}"', 1))


def new_figure(
    title: str, axes: Axes | None, *, y: str, x: str = "step (optimizer updates)"
) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, or the one that ``axes`` belong to, with title and labels."""
    if axes is None:
        figure = Figure(figsize=_SIZE)
        FigureCanvasAgg(figure)
        axes = figure.subplots()
    else:
        figure = cast(Figure, axes.get_figure(root=True))
    # A browser's font may be wider than matplotlib's, and a title is never made smaller to fit.
    axes.set_title(textwrap.fill(title, _TITLE_CHARACTERS))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis="x", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    return figure, axes


def with_legend(figure: Figure, axes: Axes) -> Figure:
    """Add a legend, if a line has a label: below the axes if these are alone in the figure, or in them."""
    entries = len(axes.get_legend_handles_labels()[1])
    # An axis on the right has the same place.
    alone = len({other.get_subplotspec() for other in figure.axes}) == 1
    if entries and not (alone and figure.get_constrained_layout()):
        axes.legend()
    elif entries:
        # Below the axes, where it covers no data.
        figure.legend(loc="outside lower left", ncols=2 if entries > 1 else 1)
    return figure


def looks_of_runs() -> Iterator[tuple[str, str]]:
    """Colour and marker of one run after another; the 36th has those of the first."""
    return zip(*map(cycle, _LOOKS_OF_RUNS), strict=True)


def legend_label(name: str) -> str:
    """A run's name as a label: matplotlib leaves out of legends what begins with an underscore."""
    return f" {name}" if name.startswith("_") else name


def baseline(axes: Axes, y: float, label: str | None, *, dashes: tuple[int, int] = (1, 2)) -> None:
    """A dashed line across the axes, for a value to compare with."""
    axes.axhline(y, color=MUTED, linewidth=1.1, linestyle=(0, dashes), label=label, zorder=1)


def signed(value: float) -> str:
    """Three digits with a sign that is as wide as the digits."""
    return f"{value:+.3g}".replace("-", "−")
