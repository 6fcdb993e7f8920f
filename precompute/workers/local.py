"""Workers as processes of this machine, each with its own GPUs, or its share of the cores.

Each worker has an engine in a process of its own, so an engine that breaks does not stop the others.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.shards.commits import committed
from dpo_opt.precompute.shards.read_plan import read_plan
from dpo_opt.precompute.workers import worker_process
from dpo_opt.schemas.counts import are, counted
from dpo_opt.schemas.errors import ConfigError, DataError, DpoOptError, FingerprintError, Preempted
from dpo_opt.schemas.safe_text import printable

_SECONDS_BETWEEN_LOOKS = 0.1
# Python handles a signal only after the running forward pass has ended.
_SECONDS_TO_STOP = 30.0
# If one worker refuses the settings, the data or the folder, the others would refuse them too.
_REFUSALS: dict[int, type[DpoOptError]] = {2: ConfigError, 3: DataError, 4: FingerprintError}
_PREEMPTED = 75


class WorkerResult(NamedTuple):
    """What one worker printed at its end."""

    scored_shards: int
    reuse_check: dict[str, Any] | None


def visible_devices(environment: Mapping[str, str]) -> list[str]:
    """GPUs that a process with this environment may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    # CUDA numbers the GPUs that it finds from 0, also in a container that shows only some.
    return [str(i) for i, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def share_of_cores(processes: int, environment: Mapping[str, str], *, cores: int) -> dict[str, str]:
    """The variables that give each of several processes its share of the cores.

    Args:
        processes: How many run at a time.
        environment: The launcher's; its own number of threads is shared, if it has one.
        cores: Cores of this machine.
    """
    threads = max(1, int(environment.get("OMP_NUM_THREADS") or cores) // processes)
    return {"OMP_NUM_THREADS": str(threads)}


def worker_environments(
    config: PrecomputeConfig, environment: Mapping[str, str], *, cores: int
) -> list[dict[str, str]]:
    """The variables that differ between workers: each one's GPUs, or its share of the cores.

    Args:
        config: How many workers there are, and how many GPUs each gets.
        environment: The launcher's.
        cores: Cores of this machine.

    Raises:
        ConfigError: There are fewer GPUs than the workers need.
    """
    workers, each = config.num_workers or 1, config.gpus_per_worker
    devices = visible_devices(environment)
    if each == 0 or (not devices and "gpus_per_worker" not in config.model_fields_set):
        return [{"CUDA_VISIBLE_DEVICES": "", **share_of_cores(workers, environment, cores=cores)}] * workers
    if workers * each > len(devices):
        if not devices:
            fix = "pass --gpus-per-worker 0 to score on the cores"
        elif len(devices) >= each:
            fix = f"pass --num-workers {len(devices) // each}"
        else:
            fix = f"pass --gpus-per-worker {len(devices)} and --num-workers 1"
        raise ConfigError(
            f"{counted(workers, 'worker')} with {counted(each, 'GPU')} each: {workers * each} in all, this "
            f"machine has {len(devices)}",
            why="two engines on one GPU would take each other's memory",
            fix=fix,
        )
    return [{"CUDA_VISIBLE_DEVICES": ",".join(devices[i * each : (i + 1) * each])} for i in range(workers)]


def own_devices(config: PrecomputeConfig, environment: Mapping[str, str]) -> str | None:
    """``CUDA_VISIBLE_DEVICES`` of a worker, where a scheduler started several on this machine.

    Its place among them is ``LOCAL_RANK`` (torchrun) or ``SLURM_LOCALID`` (srun).

    Returns:
        None if nothing is to be changed: ``gpus_per_worker`` is not given, or no more GPUs are visible.

    Raises:
        ConfigError: There are too few GPUs for a worker of this place.
    """
    rank = environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID"))
    devices, each = visible_devices(environment), config.gpus_per_worker
    if rank is None or "gpus_per_worker" not in config.model_fields_set or len(devices) <= each:
        return None
    share = devices[int(rank) * each : (int(rank) + 1) * each]
    if len(share) < each:
        raise ConfigError(
            f"worker {rank} of this machine needs {counted(each, 'GPU')}, and of {len(devices)} too few are "
            "left",
            why="two engines on one GPU would take each other's memory",
            fix=f"start {counted(len(devices) // each, 'worker')} on a machine, or pass a smaller "
            "--gpus-per-worker",
        )
    return ",".join(share)


def run_workers(config: PrecomputeConfig, environments: Sequence[Mapping[str, str]]) -> list[WorkerResult]:
    """Run processes on a planned folder until every shard is scored.

    Args:
        config: What to score.
        environments: As ``worker_environments`` gives them, one for each worker.

    Returns:
        The results of the workers that ended well. They also scored the shards of those that failed.

    Raises:
        ConfigError, DataError, FingerprintError: A worker was refused; the others are stopped.
        Preempted: A worker was stopped, and shards are left.
        DpoOptError: A worker failed, and shards are left.
    """
    with tempfile.TemporaryDirectory(prefix="dpo-opt-") as folder:
        file = Path(folder) / "precompute.yaml"
        file.write_text(config.for_workers(), encoding="utf-8")
        workers: list[_Worker] = []
        try:
            for i, own in enumerate(environments):
                place = ["--worker-index", str(i), "--num-workers", str(len(environments))]
                command = worker_process.command("precompute", "--config", str(file), *place, "--json")
                workers.append(_Worker(i, command, {**os.environ, **own}))
            codes = _wait(workers)
        finally:
            # Shards that they have not committed are left for the next run.
            stop_all([worker.process for worker in workers], within=_SECONDS_TO_STOP)
    _require_done(config, codes)
    return [worker.result() for worker in workers if codes[worker.number] == 0]


class _Worker:
    """A worker's process. Its stderr is printed line by line with its number, and its stdout is kept."""

    def __init__(self, number: int, command: list[str], environment: dict[str, str]) -> None:
        self.number = number
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self._said = ""
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._pass_on, self._keep)]
        for reader in self._readers:
            reader.start()

    def result(self) -> WorkerResult:
        """What a finished worker printed."""
        for reader in self._readers:
            reader.join()
        said = json.loads(self._said)
        return WorkerResult(said["scored_shards"], said["reuse_check"])

    def _pass_on(self) -> None:
        for line in filter(str.strip, self.process.stderr or ()):
            print(f"worker {self.number}: {printable(line.rstrip())}", file=sys.stderr, flush=True)

    def _keep(self) -> None:
        if self.process.stdout is not None:
            self._said = self.process.stdout.read()


def _wait(workers: Sequence[_Worker]) -> dict[int, int]:
    """Wait until all workers have ended, and return their exit codes.

    Raises:
        ConfigError, DataError, FingerprintError: A worker was refused.
    """
    codes: dict[int, int] = {}
    while len(codes) < len(workers):
        for worker in workers:
            code = worker.process.poll()
            if code is None or worker.number in codes:
                continue
            codes[worker.number] = code
            if code in _REFUSALS:
                raise _REFUSALS[code](
                    f"worker {worker.number} was refused, and the others would be",
                    why="what it said stands above",
                )
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return codes


def stop_all(processes: Sequence[subprocess.Popen[Any]], *, within: float) -> None:
    """Tell the processes that still run to stop, and kill those that have not after so many seconds."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.terminate()
    until = time.monotonic() + within
    for process in running:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _require_done(config: PrecomputeConfig, codes: Mapping[int, int]) -> None:
    """Check that every shard is scored: a worker may fail, if the others did its work.

    Raises:
        Preempted, DpoOptError: Shards are left.
    """
    failed = {number: code for number, code in codes.items() if code != 0}
    plan = read_plan(config.shards)
    left = len(plan.shards) - len(committed(config.shards, plan))
    if not failed or not left:
        return
    ended = ", ".join(f"worker {number} with {code}" for number, code in sorted(failed.items()))
    preempted = all(code in (_PREEMPTED, -signal.SIGTERM) for code in failed.values())
    kind = Preempted if preempted else DpoOptError
    raise kind(
        f"{left} of {counted(len(plan.shards), 'shard')} {are(left)} not scored: {ended}",
        where=str(config.shards),
        why="what a worker said at its end stands above; a negative number is the signal that ended it",
        fix="run the same command again: it goes on where this one stopped",
    )
