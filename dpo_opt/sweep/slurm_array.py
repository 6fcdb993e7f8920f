"""A sweep as a Slurm array: a task for each run that is left, and behind them a job that writes the table."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_opt.precompute.workers.slurm_scripts import (
    Jobs,
    Program,
    array_script,
    hand_over,
    last_script,
    require_no_array,
    require_submittable,
    set_by_scripts,
    this_python,
)
from dpo_opt.schemas.errors import quoted
from dpo_opt.schemas.manifest import SLURM
from dpo_opt.sweep.grid import CONFIGS, RUNS, SweepRun, write_config

_TWICE = "both would write the same runs"


class Array(NamedTuple):
    """How the tasks are asked for."""

    gpus_per_run: int = 1
    parallel: int | None = None
    """Tasks at a time; None: as many as Slurm has room for."""
    time_limit: str = "04:00:00"
    job_option: Sequence[str] = ()
    submit: bool = False


def launch_array(sweep: Path, runs: Sequence[SweepRun], array: Array) -> dict[str, Any]:
    """Write the scripts of these runs, and submit them with ``array.submit``.

    A task is a ``dpo-opt train --resume``, which goes on from its checkpoint when Slurm runs it again. It
    runs in the folder in which this was called: relative paths in its settings mean the same there.

    Returns:
        See ``slurm_scripts.hand_over``.

    Raises:
        ConfigError: An option cannot stand in a script, there is no sbatch, sbatch refuses, or an array of
            this sweep is queued or runs.
    """
    folder = sweep.absolute()
    jobs = Jobs(
        folder=folder / SLURM,
        time_limit=array.time_limit,
        job_option=array.job_option,
        taken=set_by_scripts(array="pass --parallel for the tasks at a time", logs="SWEEP/slurm/logs"),
        option="--output-dir",
        twice=_TWICE,
    )
    if array.submit:
        require_submittable(jobs)
    processes = max(1, array.gpus_per_run)
    numbers = f"0-{len(runs) - 1}" + (f"%{array.parallel}" if array.parallel else "")
    scripts = {
        "train": array_script(
            jobs,
            "train",
            _program(folder, runs, processes),
            array=numbers,
            gpus=array.gpus_per_run,
            processes=processes,
        ),
        "table": last_script(jobs, "table", this_python("sweep", "--output-dir", str(folder))),
    }
    for run in runs:
        write_config(sweep, run)
    return hand_over(
        jobs, scripts, submit=array.submit, without_last=f"`dpo-opt sweep --output-dir {quoted(sweep)}`"
    )


def require_no_array_at_work(sweep: Path) -> None:
    """Refuse a sweep of which an array is queued or runs.

    Raises:
        ConfigError: One is.
    """
    require_no_array(sweep / SLURM, why=_TWICE)


def _program(folder: Path, runs: Sequence[SweepRun], processes: int) -> Program:
    command = f'{this_python("train", "--config")} {shlex.quote(str(folder / CONFIGS))}/"$run".yaml'
    several = []
    if processes > 1:
        # Since Slurm 22.05 srun does not know the batch job's cores per task any more.
        cores = '${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"}'
        command = f"srun --ntasks={processes} --kill-on-bad-exit=1 {cores} {command}"
        # At SIGTERM srun kills its tasks; SIGUSR1 it passes on.
        several = ["warning=USR1"]
    lines = [
        f"cd -- {shlex.quote(str(Path.cwd()))} || exit 2",
        f"runs=({' '.join(shlex.quote(run.name) for run in runs)})",
        "run=${runs[$SLURM_ARRAY_TASK_ID]}",
        'echo "run $run"',
        f"command=({command})",
        f'results={shlex.quote(str(folder / RUNS))}/"$run"/checkpoints',
        *several,
    ]
    return Program(lines, result="step", remedy="a longer --time-limit, or a smaller batch_size")
