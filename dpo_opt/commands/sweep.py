"""Train a grid of runs from one cache of log-probs.

Any setting may vary: beta, learning rate, seed. Finished runs are never repeated. GRID.yaml has any settings
of `dpo-opt train`, and `grid:`, a mapping of settings to lists of values, or `runs:`, a list of mappings.
"""

from pathlib import Path

import click

from dpo_opt.options import LocationType, dry_run_option, json_option
from dpo_opt.results import say, show
from dpo_opt.schemas.errors import quoted
from dpo_opt.schemas.locations import AnyPath


@click.command(help=__doc__)
@click.option("--shards", type=LocationType(), help="Folder of reference log-probs, for every run.")
@click.option("--model", help="Model to train, for every run.")
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of the sweep: runs/, logs/ and sweep.parquet. The same command goes on there.",
)
@click.option(
    "--config",
    "grid_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    required=True,
    metavar="GRID.yaml",
    help="The settings of the runs.",
)
@click.option(
    "--parallel",
    type=click.IntRange(min=1),
    help="Runs at a time. Default: one for each GPU, and one where there is no GPU.",
)
@dry_run_option
@json_option
def command(
    shards: AnyPath | None,
    model: str | None,
    output_dir: Path,
    grid_file: Path,
    parallel: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    from dpo_opt.preemption import preemptible, same_command
    from dpo_opt.sweep.grid import read_grid
    from dpo_opt.sweep.live import outcome_lines
    from dpo_opt.sweep.outcomes import TABLE, best_first
    from dpo_opt.sweep.run_sweep import plan_sweep, run_sweep

    given = {"shards": None if shards is None else str(shards), "model": model}
    configs = read_grid(grid_file, given, sweep=output_dir)
    if dry_run:
        rows = plan_sweep(output_dir, configs)
    else:
        kept = "each run that was at work saved a checkpoint; finished runs are whole"
        with preemptible(same_command(), kept=kept):
            rows = run_sweep(output_dir, configs, parallel=parallel)
    if as_json:
        show({"sweep": str(output_dir), "runs": rows}, as_json)
        return
    say(outcome_lines(list(best_first(rows))))
    if not dry_run:
        say(["", f"table   {quoted(output_dir / TABLE)}", f"report  dpo-opt report {quoted(output_dir)}"])
