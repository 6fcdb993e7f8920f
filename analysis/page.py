"""``dpo-opt report``: writes one HTML page about one or more training runs, and its numbers as JSON.

The page has no script and loads no other file. A content security policy in its head forbids both, in case
text of a model or a dataset ever gets past the escaping.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from markupsafe import Markup

from dpo_opt.analysis.aligned_runs import by_kl, by_step
from dpo_opt.analysis.compare import difference
from dpo_opt.analysis.export_pairs import export_pairs
from dpo_opt.analysis.figures.drawing import svg
from dpo_opt.analysis.figures.frontier import frontier_figure
from dpo_opt.analysis.figures.runs import accuracy_of_runs
from dpo_opt.analysis.frontier import FrontierPoint
from dpo_opt.analysis.html import render
from dpo_opt.analysis.quadrants import MOVEMENTS
from dpo_opt.analysis.run_files import distinct_names, open_run
from dpo_opt.analysis.run_summary import run_summary
from dpo_opt.analysis.summary import NotCompared, RunDifference, Summary
from dpo_opt.analysis.table_checks import UNREADABLE, unreadable_of
from dpo_opt.analysis.view import RunView, view_run
from dpo_opt.schemas.errors import ConfigError, quoted
from dpo_opt.schemas.outputs import output_mark, require_own_output
from dpo_opt.schemas.storage import write_text

_COMMAND = "report"


def report(run_dirs: Sequence[Path], output: Path, *, pairs: Path | None = None) -> Summary:
    """Write the report of one or more runs, and its numbers beside it: ``NAME.summary.json``.

    Args:
        run_dirs: Folders that ``dpo-opt train`` wrote.
        output: The HTML file.
        pairs: A Parquet file for every pair's final numbers; see ``export_pairs``.

    Raises:
        ConfigError: A folder is not a run folder, its shards are gone, an output would replace a file that no
            report is, or no pair's final numbers are known where they are asked for.
        DataError: A table is damaged, or holds other pairs than the run's shards.
    """
    if not run_dirs:
        raise ConfigError("no run folder was named", fix="dpo-opt report RUN --output report.html")
    for file, option in ((output, "--output"), (summary_file(output), "--output"), (pairs, "--pairs")):
        if file is not None:
            require_own_output(file, option=option, command=_COMMAND)
    if pairs is not None and pairs.absolute() in (output.absolute(), summary_file(output).absolute()):
        raise ConfigError(
            "--pairs names a file that the page or its numbers are written to",
            where=str(pairs),
            why="one of the two would be lost",
            fix="name another file, such as pairs.parquet",
        )
    with tempfile.TemporaryDirectory(prefix="dpo-opt-report-") as scratch:
        views = _views(run_dirs, Path(scratch))
        if pairs is not None:
            _export(views, pairs)
        differences, not_compared = _differences(views)
        summary = Summary(
            written_by=output_mark(_COMMAND),
            runs=[run_summary(view) for view in views],
            differences=differences,
            not_compared=not_compared,
        )
    write_text(output, _page(views, summary, numbers=summary_file(output).name))
    write_text(summary_file(output), summary.model_dump_json(indent=1) + "\n")
    return summary


def _export(views: Sequence[RunView], output: Path) -> None:
    if not any(view.final for view in views):
        raise ConfigError(
            f"there are no pairs to write to {quoted(output)}",
            why="no pair's final log-probs are known",
            fix=views[0].run.score_command,
        )
    export_pairs(views, output)


def _views(run_dirs: Sequence[Path], scratch: Path) -> list[RunView]:
    views = []
    for number, (run_dir, name) in enumerate(zip(run_dirs, distinct_names(run_dirs), strict=True)):
        own = scratch / str(number)
        own.mkdir()
        run = replace(open_run(run_dir), name=name)
        try:
            views.append(view_run(run, own))
        except UNREADABLE as error:
            raise unreadable_of(run, error) from error
    return views


def summary_file(output: Path) -> Path:
    """Where the numbers of a page go: a page of its own name never replaces another page's numbers."""
    return output.with_suffix(".summary.json")


def _differences(views: Sequence[RunView]) -> tuple[list[RunDifference], list[NotCompared]]:
    """How the later runs differ from the first one, and why those that are not compared are not."""
    found, apart = [], []
    first = views[0]
    for view in views[1:]:
        name = view.run.name
        unknown = [other.run.name for other in (first, view) if other.final is None]
        if first.unpaired or view.unpaired:
            reason = "unpaired rows have no rankings that could differ"
        elif first.final is None or view.final is None:
            reason = f"no pair's final log-probs are known of {' and '.join(unknown)}"
        elif (compared := difference(view.final.pairs, first.final.pairs)) is not None:
            found.append(RunDifference.of(name, compared))
            continue
        elif view.manifest != first.manifest:
            reason = f"it was trained on other shards ({view.run.shards}, not {first.run.shards})"
        else:
            reason = "no pair's final log-probs are known of both"
        apart.append(NotCompared(run=name, reason=reason))
    return found, apart


def _page(views: Sequence[RunView], summary: Summary, *, numbers: str) -> str:
    figures = [{name: Markup(svg) for name, svg in view.figures.items()} for view in views]
    return render(
        "report.html.jinja",
        views=views,
        summaries=summary.runs,
        movements=MOVEMENTS,
        figures=figures,
        aligned=_aligned(views),
        frontiers=_frontiers(views),
        differences=summary.differences,
        not_compared=summary.not_compared,
        numbers=numbers,
        written_by=output_mark(_COMMAND),
    )


def _aligned(views: Sequence[RunView]) -> dict[str, Markup]:
    """Figures of all runs on one axis, where two or more have points on it."""
    axes = {"step": (by_step(views), "step (optimizer updates)")}
    axes["KL"] = (by_kl(views), "KL from the reference per completion, nats")
    return {
        name: Markup(svg(accuracy_of_runs(curves, along=along), label=f"Accuracy of the runs by {name}"))
        for name, (curves, along) in axes.items()
        if len(curves) > 1
    }


def _frontiers(views: Sequence[RunView]) -> dict[str, Markup]:
    """A figure for each kind of reward, over all runs that were rated by it."""
    by_rater: dict[tuple[str, str | None], list[FrontierPoint]] = {}
    for point in (point for view in views for point in view.frontier):
        by_rater.setdefault((point.rated_by, point.rated_by_sha256), []).append(point)
    names = [name for name, _ in by_rater]
    found = {}
    for (name, sha256), points in by_rater.items():
        # A function that was edited, or models of one name, rate differently.
        rated_by = f"{name} ({(sha256 or 'no file')[:8]})" if names.count(name) > 1 else name
        label = f"Mean reward against KL, rated by {rated_by}"
        found[rated_by] = Markup(svg(frontier_figure(points), label=label))
    return found
