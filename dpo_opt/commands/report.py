"""Write one HTML page about training runs.

RUNS are folders of runs or of sweeps. The page is self-contained.
"""

from pathlib import Path

import click

from dpo_opt.options import json_option
from dpo_opt.results import show


@click.command(help=__doc__)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="HTML file to write; its numbers go beside it, as NAME.summary.json.",
)
@click.option(
    "--pairs",
    type=click.Path(path_type=Path),
    help="Parquet file to write as well: every pair's margins, log-ratios and quadrants under each run.",
)
@json_option
def command(runs: tuple[Path, ...], output: Path, pairs: Path | None, as_json: bool) -> None:
    from dpo_opt.analysis import report as write_report
    from dpo_opt.analysis.page import summary_file
    from dpo_opt.sweep.grid import run_folders

    write_report([run for path in runs for run in run_folders(path)], output, pairs=pairs)
    written = {"report": str(output), "summary": str(summary_file(output))}
    show(written | ({"pairs": str(pairs)} if pairs else {}), as_json)
