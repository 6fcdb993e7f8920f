"""Runs a sweep's runs as processes of this machine, as many at a time as it has GPUs for.

A run is an ordinary ``dpo-opt train --resume``: it goes on where it was killed, and equals the same run
started alone. A run with several GPUs is several such processes, with the variables that torchrun gives.
"""

import contextlib
import fcntl
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import click

from dpo_opt.precompute.workers import worker_process
from dpo_opt.precompute.workers.local import share_of_cores, stop_all, visible_devices
from dpo_opt.schemas.errors import ConfigError, DpoOptError, quoted
from dpo_opt.sweep.grid import RUNS, SweepRun, write_config

_LOGS = "logs"
_LOCK = ".lock"
_LOCK_OF_RUNS = ".lock-of-runs"
_SECONDS_BETWEEN_LOOKS = 0.5
# A run that is told to stop first finishes a micro-batch, and then saves its checkpoint.
_SECONDS_TO_STOP = 600.0
# Where one process of a run has failed, the others may wait for it, and hear no signal.
_SECONDS_FOR_OTHERS = 30.0


class Ended(NamedTuple):
    """A run whose process has ended."""

    run: SweepRun
    code: int
    log: Path
    said_from: int
    """Where in its log this process began to speak."""


@contextlib.contextmanager
def only_sweep(sweep: Path) -> Iterator[int]:
    """Keep a second sweep out of the folder while the block runs. Waits for runs of one that was killed.

    Yields:
        A file for the processes of runs to inherit: while one of them lives, the next sweep waits.

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
        with (sweep / _LOCK_OF_RUNS).open("a") as of_runs:
            try:
                fcntl.flock(of_runs, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                click.echo("waiting for runs of a sweep that was killed: they save and end", err=True)
                fcntl.flock(of_runs, fcntl.LOCK_EX)
            yield of_runs.fileno()


def process_environments(
    parallel: int | None, gpus_per_run: int | None, environment: Mapping[str, str], *, cores: int
) -> list[dict[str, str]]:
    """The variables of each run that is at work at a time: its GPUs, or its share of the cores.

    Args:
        parallel: How many runs at a time; None: as many as there are GPUs for, and one without GPUs.
        gpus_per_run: GPUs of each; None: one, and none where there is no GPU.
        environment: The variables of this process.
        cores: Cores of this machine.

    Raises:
        ConfigError: There are fewer GPUs.
    """
    devices = visible_devices(environment)
    each = min(1, len(devices)) if gpus_per_run is None else gpus_per_run
    if each == 0:
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if devices else {}
        if parallel in (None, 1):
            return [hidden]
        return [hidden | share_of_cores(parallel, environment, cores=cores)] * parallel
    places = len(devices) // each
    if places < (parallel or 1):
        given = {"--parallel": parallel, "--gpus-per-run": gpus_per_run}
        asked = " ".join(f"{option} {value}" for option, value in given.items() if value is not None)
        if places:
            fix = f"pass --parallel {places}, or leave it out"
        elif devices:
            fix = f"pass --gpus-per-run {len(devices)}"
        else:
            fix = "leave out --gpus-per-run to train on the cores"
        raise ConfigError(
            f"{asked}: this machine has {len(devices)} GPUs",
            why="two runs on one GPU would take each other's memory",
            fix=fix,
        )
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(devices[i * each : (i + 1) * each])}
        for i in range(parallel or places)
    ]


def run_processes(
    sweep: Path,
    runs: Sequence[SweepRun],
    environments: Sequence[Mapping[str, str]],
    *,
    processes: int,
    held: int,
    looked: Callable[[Sequence[SweepRun]], None],
) -> Iterator[Ended]:
    """Train every run; those that fail do not stop the others. However this ends, no process is left.

    Args:
        sweep: The sweep's folder.
        runs: What to train, in this order.
        environments: As ``process_environments`` gives them: one run at a time on each.
        processes: Of each run.
        held: From ``only_sweep``.
        looked: Called twice a second with the runs that are at work.

    Yields:
        Each run when its processes have ended.
    """
    waiting = list(runs)
    # One place for each environment.
    at_work: list[_Process | None] = [None] * len(environments)
    try:
        while waiting or any(at_work):
            for place, process in enumerate(at_work):
                if process is not None and (code := _code(process)) is not None:
                    at_work[place] = None
                    yield Ended(process.run, code, process.log, process.said_from)
                if at_work[place] is None and waiting:
                    run, environment = waiting.pop(0), environments[place]
                    at_work[place] = _start(sweep, run, environment, processes=processes, held=held)
            looked([process.run for process in at_work if process is not None])
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    finally:
        left = [one for process in at_work if process is not None for one in process.running]
        stop_all(left, within=_SECONDS_TO_STOP)


def last_error(ended: Ended) -> str:
    """The error that a run ended with, with why and fix; its last line where there is none."""
    said = ended.log.read_bytes()[ended.said_from :].decode(errors="replace")
    lines = said.splitlines() or ["(it said nothing)"]
    # Of several processes the first that failed says why; the others lost it.
    begin = next((i for i, line in enumerate(lines) if line.startswith("error: ")), len(lines) - 1)
    return "\n".join(lines[begin : begin + 3]).removeprefix("error: ")


class _Process(NamedTuple):
    """A run that is at work."""

    run: SweepRun
    log: Path
    said_from: int
    running: list[subprocess.Popen[bytes]]


def _start(
    sweep: Path, run: SweepRun, environment: Mapping[str, str], *, processes: int, held: int
) -> _Process:
    """Start a run. What it says is appended to its log."""
    config, log = write_config(sweep, run), sweep / _LOGS / f"{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as said:
        said_from = said.tell()
        running = [
            subprocess.Popen(
                worker_process.command("train", "--config", str(config)),
                env={**os.environ, **environment, **place},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                pass_fds=[held],
                # Ctrl-C on a terminal would end training at once; at SIGTERM it saves a checkpoint first.
                start_new_session=True,
            )
            for place in _places(processes)
        ]
    return _Process(run, log, said_from, running)


def _places(processes: int) -> list[dict[str, str]]:
    """The variables by which the processes of a run find each other."""
    if processes == 1:
        return [{}]
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    size = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [{"RANK": str(i), "LOCAL_RANK": str(i), **size, **meeting} for i in range(processes)]


def _code(process: _Process) -> int | None:
    """The exit code of a run that has ended: of several processes, the first that is not 0."""
    codes = [one.poll() for one in process.running]
    bad = next((code for code in codes if code), None)
    if bad is not None:
        stop_all(process.running, within=_SECONDS_FOR_OTHERS)
        return bad
    return None if None in codes else 0


def failed(ended: Sequence[Ended], sweep: Path, *, of: int) -> DpoOptError:
    """The error of a sweep in which runs failed: what the first of them said, and where the others' are."""
    first = ended[0]
    return DpoOptError(
        f"{len(ended)} of {of} runs failed; the first is {first.run.name}, with exit code {first.code}: "
        f"{last_error(first)}",
        where=str(sweep / RUNS),
        why=f"the table has the others; each run's own words are in {quoted(sweep / _LOGS)}",
        fix="mend what the first one names, and run the same command again: finished runs are not repeated",
    )
