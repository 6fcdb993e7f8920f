"""A sweep from its beginning to its table: what is left to train, the processes, what came out."""

import os
from collections.abc import Sequence
from pathlib import Path

from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.prepare import prepare
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.sweep.grid import SweepRun, named_runs, naming, record_runs, recorded_runs
from dpo_opt.sweep.live import watching
from dpo_opt.sweep.outcomes import Row, outcomes, state_of, write_table
from dpo_opt.sweep.processes import Ended, failed, only_sweep, process_environments, run_processes


def plan_sweep(sweep: Path, configs: Sequence[TrainConfig]) -> list[Row]:
    """The runs that a sweep would train, with the state of each; writes nothing.

    Raises:
        DpoOptError: See ``run_sweep``.
    """
    runs = named_runs(sweep, configs)
    _require_trainable(_left(runs))
    return outcomes(runs)


def run_sweep(sweep: Path, configs: Sequence[TrainConfig], *, parallel: int | None = None) -> list[Row]:
    """Train each configuration that is not finished yet, and write ``sweep.parquet``.

    Args:
        sweep: The sweep's folder. It may have runs of an earlier call, also of another grid.
        configs: As ``grid.read_grid`` gives them.
        parallel: Runs at a time; None: one for each GPU, and one where there is no GPU.

    Returns:
        The rows of the table: a run each, those of earlier grids too.

    Raises:
        ConfigError: A second sweep is at work in the folder, or a run cannot work.
        DataError: The shards are incomplete or damaged, or ``sweep.yaml`` is.
        FingerprintError: The shards were scored with another model.
        DpoOptError: Runs failed. The others were trained, and the table is written.
    """
    environments = process_environments(parallel, os.environ, cores=len(os.sched_getaffinity(0)))
    # Before anything is written.
    _require_trainable(_left(named_runs(sweep, configs)))
    with only_sweep(sweep):
        runs = named_runs(sweep, configs)
        left = _left(runs)
        record_runs(sweep, runs)
        bad: list[Ended] = []
        with watching(runs) as watch:
            for ended in run_processes(sweep, left, environments, looked=watch.look):
                watch.ended(ended)
                if ended.code != 0:
                    bad.append(ended)
                write_table(sweep, outcomes(recorded_runs(sweep)))
        rows = outcomes(recorded_runs(sweep))
        write_table(sweep, rows)
    if bad:
        raise failed(bad, sweep, of=len(runs))
    return rows


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
