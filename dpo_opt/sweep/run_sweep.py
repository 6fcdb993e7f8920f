"""A sweep from its beginning to its table: what is left to train, the processes, what came out."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.prepare import prepare
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.sweep.grid import SWEEP, SweepRun, named_runs, naming, record_runs, recorded_runs
from dpo_opt.sweep.live import watching
from dpo_opt.sweep.outcomes import Row, outcomes, state_of, write_table
from dpo_opt.sweep.processes import Ended, failed, only_sweep, process_environments, run_processes
from dpo_opt.sweep.slurm_array import Array, launch_array, require_no_array_at_work


def plan_sweep(sweep: Path, configs: Sequence[TrainConfig]) -> list[Row]:
    """The runs that a sweep would train, with the state of each; writes nothing.

    Raises:
        DpoOptError: See ``run_sweep``.
    """
    runs = named_runs(sweep, configs)
    _require_trainable(_left(runs))
    return outcomes(runs)


def run_sweep(
    sweep: Path,
    configs: Sequence[TrainConfig],
    *,
    parallel: int | None = None,
    gpus_per_run: int | None = None,
) -> list[Row]:
    """Train each configuration that is not finished yet, and write ``sweep.parquet``.

    Args:
        sweep: The sweep's folder. It may have runs of an earlier call, also of another grid.
        configs: As ``grid.read_grid`` gives them.
        parallel: Runs at a time; None: as many as there are GPUs for, and one where there is no GPU.
        gpus_per_run: GPUs of each run, with a process for each; None: one, and none where there is no GPU.

    Returns:
        The rows of the table: a run each, those of earlier grids too.

    Raises:
        ConfigError: A second sweep is at work in the folder, or a run cannot work.
        DataError: The shards are incomplete or damaged, or ``sweep.yaml`` is.
        FingerprintError: The shards were scored with another model.
        DpoOptError: Runs failed. The others were trained, and the table is written.
    """
    cores = len(os.sched_getaffinity(0))
    environments = process_environments(parallel, gpus_per_run, os.environ, cores=cores)
    with _begun(sweep, configs) as (runs, held):
        bad: list[Ended] = []
        with watching(runs) as watch:
            processes = run_processes(
                sweep,
                _left(runs),
                environments,
                processes=max(1, gpus_per_run or 1),
                held=held,
                looked=watch.look,
            )
            for ended in processes:
                watch.ended(ended)
                if ended.code != 0:
                    bad.append(ended)
                write_outcomes(sweep)
        rows = write_outcomes(sweep)
    if bad:
        raise failed(bad, sweep, of=len(runs))
    return rows


def launch_sweep(
    sweep: Path, configs: Sequence[TrainConfig], array: Array
) -> tuple[list[Row], dict[str, Any]]:
    """Write a Slurm array of what is not finished yet, and ``sweep.parquet`` of what is.

    Returns:
        The rows of the table, and what ``launch_array`` says; that is empty where nothing is left.

    Raises:
        DpoOptError: See ``run_sweep`` and ``launch_array``.
    """
    with _begun(sweep, configs) as (runs, _):
        left = _left(runs)
        launched = launch_array(sweep, left, array) if left else {}
        return write_outcomes(sweep), launched


def recorded_outcomes(sweep: Path) -> list[Row]:
    """The rows of all runs that ``sweep.yaml`` has, from their folders.

    Raises:
        ConfigError: There is no ``sweep.yaml``.
        DataError: It is damaged.
    """
    runs = recorded_runs(sweep)
    if not runs:
        raise ConfigError(
            "there is no sweep here",
            where=str(sweep),
            why=f"{SWEEP} says which runs a sweep has",
            fix="pass --config GRID.yaml to begin one",
        )
    return outcomes(runs)


def write_outcomes(sweep: Path) -> list[Row]:
    """Write ``sweep.parquet``: the rows that are returned.

    Raises:
        ConfigError, DataError: See ``recorded_outcomes``.
    """
    rows = recorded_outcomes(sweep)
    write_table(sweep, rows)
    return rows


@contextlib.contextmanager
def _begun(sweep: Path, configs: Sequence[TrainConfig]) -> Iterator[tuple[list[SweepRun], int]]:
    """Check the runs and record them; then keep others out of the folder while the block runs.

    Yields:
        A run for each configuration, and what ``only_sweep`` yields.
    """
    # Before anything is written.
    _require_trainable(_left(named_runs(sweep, configs)))
    require_no_array_at_work(sweep)
    with only_sweep(sweep) as held:
        runs = named_runs(sweep, configs)
        record_runs(sweep, runs)
        yield runs, held


def _left(runs: Sequence[SweepRun]) -> list[SweepRun]:
    return [run for run in runs if state_of(run) != "finished"]


def _require_trainable(runs: Sequence[SweepRun]) -> None:
    """Check every run, so that what one cannot do is said before any begins. No weights are loaded."""
    compared: set[tuple[object, ...]] = set()
    for run in runs:
        config, folder = run.config, run.config.output_dir
        # Reading a model's weights to compare them takes longest, and most sweeps have one model.
        model = (config.shards, config.model, config.adapter, config.reference_differs)
        with naming(run.name, config):
            if folder.exists() and not folder.is_dir():
                raise ConfigError(
                    "its folder is a file", where=str(folder), fix="remove it, or pass another --output-dir"
                )
            prepare(config, compares_model=model not in compared)
        compared.add(model)
