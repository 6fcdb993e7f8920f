"""``dpo-opt report``: writes one HTML page about one or more training runs, and summary.json with numbers.

The page has no script and loads no other file. A content security policy in its head forbids both, in case
text of a model or a dataset ever gets past the escaping.
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
    """Write the report of one or more runs, and ``summary.json`` in the same folder.

    Args:
        run_dirs: Folders that ``dpo-opt train`` wrote.
        output: The HTML file.

    Raises:
        ConfigError: A folder is not a run folder, its shards are gone, or the output cannot be written there.
        DataError: A table is damaged, or holds other pairs than the run's shards.
    """
    if not run_dirs:
        raise ConfigError("no run folder was named", fix="dpo-opt report RUN --output report.html")
    if output.name == SUMMARY or output.is_dir():
        raise ConfigError(
            f"the page cannot be written to {quoted(output)}",
            why=f"it is a folder, or the name of the {SUMMARY} that is written next to the page",
            fix="dpo-opt report RUN --output report.html",
        )
    views = []
    for run_dir in run_dirs:
        try:
            views.append(view_run(open_run(Path(run_dir))))
        except pl.exceptions.ComputeError as error:
            # The files' footers were readable, but their data pages are not.
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
