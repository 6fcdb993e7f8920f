"""One HTML file that says what a training run did, and the same numbers for machines.

The page has no script and loads nothing; a policy in its head forbids both, should text of a model or
a data set ever get past the escaping.
"""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import jinja2
import polars as pl
from markupsafe import Markup

from dpo_opt.analysis.intervals import Interval
from dpo_opt.analysis.runs import open_run
from dpo_opt.analysis.summary import Summary
from dpo_opt.analysis.texts import printable
from dpo_opt.analysis.view import RunView, view_run
from dpo_opt.schemas.errors import ConfigError, DataError
from dpo_opt.schemas.storage import write_text

SUMMARY = "summary.json"

_TEMPLATE = Path(__file__).with_name("page.html.jinja")


def report(run_dirs: Sequence[Path], output: Path) -> Summary:
    """Write the report of one or several runs, and ``summary.json`` beside it.

    Args:
        run_dirs: Folders that ``dpo-opt train`` wrote.
        output: The HTML file.

    Raises:
        ConfigError: A folder is no run folder, its shards are gone, or the output cannot be written there.
        DataError: A table is damaged, or holds other pairs than the run's shards.
    """
    if not run_dirs:
        raise ConfigError("no run folder was named", fix="dpo-opt report RUN --output report.html")
    if output.name == SUMMARY or output.is_dir():
        raise ConfigError(
            f"the page cannot be written to {output}",
            why=f"it is a folder, or the name of the {SUMMARY} that is written beside the page",
            fix="dpo-opt report RUN --output report.html",
        )
    views = []
    for run_dir in run_dirs:
        try:
            views.append(view_run(open_run(Path(run_dir))))
        except pl.exceptions.ComputeError as error:
            # What the footers said was right; the pages behind them are not.
            raise DataError(
                f"a table cannot be read ({str(error).splitlines()[0]})",
                where=str(run_dir),
                why="one of its Parquet files is damaged",
            ) from error
    summary = Summary(runs=[view.summary for view in views])
    write_text(output, _page(views))
    write_text(output.with_name(SUMMARY), summary.model_dump_json(indent=1) + "\n")
    return summary


def _page(views: Sequence[RunView]) -> str:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        count=_count, num=_num, signed=_signed, pct=_pct, pct_bounds=_pct_bounds, bounds=_bounds
    )
    # Every string that is not made here passes through this, names of folders and sources included.
    environment.finalize = lambda value: printable(value) if type(value) is str else value
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        views=views,
        figures=[{name: Markup(svg) for name, svg in view.figures.items()} for view in views],
        version=version("dpo-opt"),
        written=datetime.now(tz=UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _count(value: int) -> str:
    return f"{value:,}"


def _num(value: float | None, digits: int = 3) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    # A minus sign is as wide as the digits, a hyphen is not.
    return f"{value:.{digits}g}".replace("-", "−")


def _signed(value: float | None, digits: int = 3) -> str:
    text = _num(value, digits)
    return text if value is None or text[0] in "–−" or value == 0 else f"+{text}"


def _pct(value: float | None, decimals: int = 1) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{decimals}%}"


def _pct_bounds(interval: Interval) -> str:
    if not math.isfinite(interval.low):
        return "one prompt: no interval"
    return f"{100 * interval.low:.1f} to {interval.high:.1%}"


def _bounds(interval: Interval) -> str:
    if not math.isfinite(interval.low):
        return "one prompt: no interval"
    return f"{_num(interval.low)} to {_num(interval.high)}"
