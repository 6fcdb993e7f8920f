"""Train a grid of runs from one cache of log-probs.

Any setting may vary: beta, learning rate, seed. Finished runs are never repeated. GRID.yaml has any settings
of `dpo-opt train`, and `grid:`, a mapping of settings to lists of values, or `runs:`, a list of mappings.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from dpo_opt.options import LocationType, dry_run_option, json_option
from dpo_opt.results import say, show
from dpo_opt.schemas.errors import ConfigError, quoted
from dpo_opt.schemas.locations import AnyPath


@click.command(help=__doc__)
@click.option("--shards", type=LocationType(), help="Folder of reference log-probs, for every run.")
@click.option("--model", help="Model to train, for every run.")
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of the sweep: runs/, logs/ and sweep.parquet. The same command goes on there. Without other "
    "options, the table is written from what is there.",
)
@click.option(
    "--config",
    "grid_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="GRID.yaml",
    help="The settings of the runs.",
)
@click.option(
    "--parallel",
    type=click.IntRange(min=1),
    help="Runs at a time. Default: as many as there are GPUs for, one without GPUs; slurm: all.",
)
@click.option(
    "--gpus-per-run",
    type=click.IntRange(min=0),
    help="GPUs of each run, a process on each. Default: 1; local: none on a machine without GPUs.",
)
@click.option(
    "--scheduler",
    type=click.Choice(["local", "slurm"]),
    default="local",
    show_default=True,
    help="Where the runs run: processes on this machine, or the tasks of a Slurm array.",
)
@click.option(
    "--submit", is_flag=True, help="slurm: also submit the job scripts instead of only writing them."
)
@click.option(
    "--time-limit", help="slurm: sbatch's --time for one run; at it the run is requeued. Default: 04:00:00."
)
@click.option(
    "--job-option",
    multiple=True,
    help="slurm: an option of sbatch, such as partition=gpu. Repeat it for each option.",
)
@dry_run_option
@json_option
def command(
    shards: AnyPath | None,
    model: str | None,
    output_dir: Path,
    grid_file: Path | None,
    parallel: int | None,
    gpus_per_run: int | None,
    scheduler: str,
    submit: bool,
    time_limit: str | None,
    job_option: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> None:
    from dpo_opt.preemption import preemptible, same_command
    from dpo_opt.sweep.grid import read_grid
    from dpo_opt.sweep.live import outcome_lines
    from dpo_opt.sweep.outcomes import TABLE, best_first
    from dpo_opt.sweep.run_sweep import (
        launch_sweep,
        plan_sweep,
        recorded_outcomes,
        run_sweep,
        write_outcomes,
    )
    from dpo_opt.sweep.slurm_array import Array

    if scheduler != "slurm":
        _refuse_of_slurm({"--submit": submit, "--time-limit": time_limit, "--job-option": job_option})
    launched: dict[str, Any] = {}
    if grid_file is None:
        _require_alone(
            {
                "--shards": shards,
                "--model": model,
                "--parallel": parallel,
                "--gpus-per-run": gpus_per_run,
                "--scheduler": None if scheduler == "local" else scheduler,
            }
        )
        rows = recorded_outcomes(output_dir) if dry_run else write_outcomes(output_dir)
    else:
        common = {"shards": None if shards is None else str(shards), "model": model}
        configs = read_grid(grid_file, common, sweep=output_dir)
        if dry_run:
            rows = plan_sweep(output_dir, configs)
        elif scheduler == "slurm":
            gpus = 1 if gpus_per_run is None else gpus_per_run
            array = Array(gpus, parallel, time_limit or "04:00:00", job_option, submit)
            rows, launched = launch_sweep(output_dir, configs, array)
        else:
            kept = "each run that was at work saved a checkpoint; finished runs are whole"
            with preemptible(same_command(), kept=kept):
                rows = run_sweep(output_dir, configs, parallel=parallel, gpus_per_run=gpus_per_run)
    if as_json:
        show({"sweep": str(output_dir), "runs": rows, **launched}, as_json)
        return
    say(outcome_lines(list(best_first(rows))))
    if not dry_run:
        say(["", f"table   {quoted(output_dir / TABLE)}", f"report  dpo-opt report {quoted(output_dir)}"])
    if launched:
        show(launched, as_json)


def _refuse_of_slurm(given: Mapping[str, object]) -> None:
    for option in (option for option, value in given.items() if value):
        raise ConfigError(
            f"{option} is an option of --scheduler slurm",
            why="with --scheduler local it would have no effect",
            fix="pass --scheduler slurm",
        )


def _require_alone(given: Mapping[str, object]) -> None:
    for option in (option for option, value in given.items() if value is not None):
        raise ConfigError(
            f"{option} is given, and --config is not",
            why="without a grid nothing is trained: the table is written from the runs that are there",
            fix="pass --config GRID.yaml",
        )
