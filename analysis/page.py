"""One HTML file that says what a training run did, and the same numbers for machines.

The page has no script and loads nothing; a policy in its head forbids both, should text of a model or
a data set ever get past the escaping.
"""

from collections.abc import Sequence
from pathlib import Path

import polars as pl
from markupsafe import Markup

from dpo_opt.analysis.html import render
from dpo_opt.analysis.run_files import open_run
from dpo_opt.analysis.summary import Summary
from dpo_opt.analysis.view import RunView, view_run
from dpo_opt.schemas.errors import ConfigError, DataError, first_line, quoted
from dpo_opt.schemas.storage import write_text

SUMMARY = "summary.json"


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
            f"the page cannot be written to {quoted(output)}",
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
                f"a table cannot be read ({first_line(error)})",
                where=str(run_dir),
                why="one of its Parquet files is damaged",
            ) from error
    summary = Summary(runs=[view.summary for view in views])
    write_text(output, _page(views))
    write_text(output.with_name(SUMMARY), summary.model_dump_json(indent=1) + "\n")
    return summary


def _page(views: Sequence[RunView]) -> str:
    figures = [{name: Markup(svg) for name, svg in view.figures.items()} for view in views]
    return render("page.html.jinja", views=views, figures=figures)
