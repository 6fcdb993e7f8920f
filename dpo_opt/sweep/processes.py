"""Runs a sweep's runs as processes of this machine, as many at a time as it has GPUs for.

A run is an ordinary ``dpo-opt train --resume``: it goes on where it was killed, and equals the same run
started alone.
"""

import contextlib
import fcntl
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from dpo_opt.precompute.workers import worker_process
from dpo_opt.precompute.workers.local import share_of_cores, stop_all, visible_devices
from dpo_opt.schemas.errors import ConfigError, DpoOptError, quoted
from dpo_opt.schemas.storage import write_text
from dpo_opt.sweep.grid import RUNS, SweepRun

_LOGS = "logs"
_CONFIGS = "configs"
_LOCK = ".lock"
_SECONDS_BETWEEN_LOOKS = 0.5
# A run that is told to stop first finishes a micro-batch, and then saves its checkpoint.
_SECONDS_TO_STOP = 600.0


class Ended(NamedTuple):
    """A run whose process has ended."""

    run: SweepRun
    code: int
    log: Path


@contextlib.contextmanager
def only_sweep(sweep: Path) -> Iterator[None]:
    """Keep a second sweep out of the folder while the block runs.

    Raises:
        ConfigError: One is at work there.
    """
    sweep.mkdir(parents=True, exist_ok=True)
    with (sweep / _LOCK).open("a") as lock:
        try:
            # The kernel lets go of it however this process ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                "another dpo-opt sweep is at work in this folder",
                where=str(sweep),
                why="both would write the same runs",
                fix="let it end, or pass another --output-dir",
            ) from error
        yield


def process_environments(
    parallel: int | None, environment: Mapping[str, str], *, cores: int
) -> list[dict[str, str]]:
    """The variables of each process that runs at a time: its GPU, or its share of the cores.

    Args:
        parallel: How many runs at a time; None: one for each GPU, and one where there is no GPU.
        environment: The variables of this process.
        cores: Cores of this machine.

    Raises:
        ConfigError: There are fewer GPUs.
    """
    devices = visible_devices(environment)
    if not devices:
        if parallel in (None, 1):
            return [{}]
        return [share_of_cores(parallel, environment, cores=cores)] * parallel
    if parallel is not None and parallel > len(devices):
        raise ConfigError(
            f"--parallel {parallel}: this machine has {len(devices)} GPUs",
            why="two runs on one GPU would take each other's memory",
            fix=f"pass --parallel {len(devices)}, or leave it out",
        )
    return [{"CUDA_VISIBLE_DEVICES": device} for device in devices[:parallel]]


def run_processes(
    sweep: Path,
    runs: Sequence[SweepRun],
    environments: Sequence[Mapping[str, str]],
    *,
    looked: Callable[[Sequence[SweepRun]], None],
) -> Iterator[Ended]:
    """Train every run; those that fail do not stop the others. However this ends, no process is left.

    Args:
        sweep: The sweep's folder.
        runs: What to train, in this order.
        environments: As ``process_environments`` gives them: one run at a time on each.
        looked: Called twice a second with the runs that are at work.

    Yields:
        Each run when its process has ended.
    """
    waiting = list(runs)
    # One place for each environment.
    at_work: list[_Process | None] = [None] * len(environments)
    try:
        while waiting or any(at_work):
            for place, process in enumerate(at_work):
                if process is not None and (code := process.running.poll()) is not None:
                    at_work[place] = None
                    yield Ended(process.run, code, process.log)
                if at_work[place] is None and waiting:
                    at_work[place] = _start(sweep, waiting.pop(0), environments[place])
            looked([process.run for process in at_work if process is not None])
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    finally:
        stop_all([process.running for process in at_work if process is not None], within=_SECONDS_TO_STOP)


def last_error(log: Path) -> str:
    """The error that a run ended with, with why and fix; its last line where there is none."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or ["(it said nothing)"]
    begin = max((i for i, line in enumerate(lines) if line.startswith("error: ")), default=len(lines) - 1)
    return "\n".join(lines[begin : begin + 3]).removeprefix("error: ")


class _Process(NamedTuple):
    """One run's process."""

    run: SweepRun
    log: Path
    running: subprocess.Popen[bytes]


def _start(sweep: Path, run: SweepRun, environment: Mapping[str, str]) -> _Process:
    """Start a run's process. What it says is appended to the run's log."""
    config, log = sweep / _CONFIGS / f"{run.name}.yaml", sweep / _LOGS / f"{run.name}.log"
    write_text(config, yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False))
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as said:
        process = subprocess.Popen(
            worker_process.command("train", "--config", str(config)),
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            # Ctrl-C on a terminal would end training at once; told by SIGTERM it saves a checkpoint first.
            start_new_session=True,
        )
    return _Process(run, log, process)


def failed(ended: Sequence[Ended], sweep: Path, *, of: int) -> DpoOptError:
    """The error of a sweep in which runs failed: what the first of them said, and where the others' are."""
    first = ended[0]
    return DpoOptError(
        f"{len(ended)} of {of} runs failed; the first is {first.run.name}, with exit code {first.code}: "
        f"{last_error(first.log)}",
        where=str(sweep / RUNS),
        why=f"the table has the others; each run's own words are in {quoted(sweep / _LOGS)}",
        fix="mend what the first one names, and run the same command again: finished runs are not repeated",
    )
