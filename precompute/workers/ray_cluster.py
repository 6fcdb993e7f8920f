"""Workers as Ray tasks: Ray places them, and restarts those that were killed or lost with a node.

Only settings travel through Ray. Workers write log-probs to the folder of shards, which every node must see.
So a worker that is lost does not take its commits along.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Self

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.shards.commits import committed
from dpo_opt.precompute.shards.read_plan import read_plan
from dpo_opt.schemas.counts import counted
from dpo_opt.schemas.errors import ConfigError, DpoOptError, Preempted, first_line
from dpo_opt.schemas.manifest import PLAN

# A worker that has died this often is on a bad node, or is itself the cause. The others take its shards.
_RESTARTS = 5
# Only settings and errors go through the store, for which Ray would reserve 30 % of the memory.
_OBJECT_STORE_BYTES = 100 * 2**20
_SECONDS_TO_STOP = 10.0
_SECONDS_TO_ANSWER = 10.0
_SECONDS_BETWEEN_LOOKS = 0.5

Work = Callable[[PrecomputeConfig], int]


def run_workers(config: PrecomputeConfig, work: Work) -> None:
    """Run ``config.num_workers`` workers on Ray until every shard is scored.

    A process that is already connected to a cluster uses that connection and keeps it. Otherwise the cluster
    is the one at ``ray_address`` or in ``RAY_ADDRESS``, which continues to run. If neither is set, a cluster
    is started on this machine, and ends with this call.

    Args:
        config: What to score. The folder has its plan already.
        work: What one worker does. It is called in a process of its own, with the worker's ``worker_index``.

    Raises:
        ConfigError: Ray is not installed or not reached, has no room for the workers, or its nodes do not see
            the folder.
        DpoOptError: The first error that a worker raised, unchanged; or a worker was lost for good, and
            shards are left. Any other exception that a worker raised at every attempt is raised if shards
            are left.
    """
    ray = _import_ray()
    # Ray always reports lost workers on stdout, which is for results.
    with contextlib.redirect_stdout(sys.stderr), _HeldSignals() as held, _connected(ray, config, held):
        _require_room(ray, config)
        failures = _run_all(ray, config, work, held)
    if failures:
        plan = read_plan(config.shards)
        if len(committed(config.shards, plan)) < len(plan.shards):
            _raise_first(failures)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ConfigError("Ray is not installed", fix="pip install 'dpo-opt[ray]'") from error
    return ray


class _HeldSignals:
    """Holds SIGTERM and SIGUSR1 back until ``deliver``.

    If a handler raised while Ray's code runs, Ray would print the exception and drop it. Only handlers that
    the caller set are held back, and only in the main thread, because no other thread runs handlers.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._came: list[int] = []

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
        self.hold()
        return self

    def hold(self) -> None:
        """Take the signals back, if Ray has set handlers of its own."""
        for number in self._handlers:
            signal.signal(number, lambda number, frame: self._came.append(number))

    def deliver(self, *more: int) -> None:
        """Run the caller's handlers of the signals that came, and then of ``more``."""
        came, self._came = [*self._came, *more], []
        for number in came:
            if number in self._handlers:
                self._handlers[number](number, None)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if kind is None:
            self.deliver()


@contextlib.contextmanager
def _connected(ray: Any, config: PrecomputeConfig, held: _HeldSignals) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    # "local", because Ray would otherwise join any cluster that runs on this machine.
    address = config.ray_address or os.environ.get("RAY_ADDRESS") or "local"
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # One CPU per worker, however many cores there are, because only these workers use the cluster.
        settings |= {
            "num_cpus": config.num_workers,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
    try:
        try:
            _require_answer(address)
            ray.init(address=address, **settings)
        except (OSError, ImportError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            reason = first_line(error, lines=1, named=False)
            if address == "local":
                raise ConfigError(f"Ray does not start on this machine: {reason}") from error
            raise ConfigError(
                f"no connection to Ray: {reason}",
                where=address,
                fix="check with `ray status --address ADDRESS`, then pass --ray-address or set RAY_ADDRESS",
            ) from error
        except SystemExit:
            # Ray replaces all handlers as soon as it starts, and its handler raised this.
            held.deliver(signal.SIGTERM)
            raise
        # If the caller has no handler, Ray's stays, because it lets this block end.
        held.hold()
        held.deliver()
        yield
    finally:
        # This ends a cluster that `init` started, and only disconnects from any other.
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Check that an address answers, because Ray would try for 5 minutes to reach a wrong one.

    Raises:
        OSError: Nothing listens there.
        ValueError: It is no ``HOST:PORT``.
    """
    if address in ("local", "auto") or "://" in address:
        return
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_ANSWER).close()


def _require_room(ray: Any, config: PrecomputeConfig) -> None:
    """Refuse workers for which the cluster has no room, because Ray would wait for ever.

    Raises:
        ConfigError: Not all workers can have their GPUs at once, or none of them has a place.
    """
    workers, each = config.num_workers or 1, config.gpus_per_worker
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # Counted per node, because one worker's GPUs cannot be on two nodes.
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    places = sum(min(c, g // each) if each else c for c, g in zip(cpus, gpus, strict=True))
    # Workers without GPUs may run one after another, so one place is enough.
    if places >= workers or (places and not each):
        return
    total = ray.cluster_resources()
    if places:
        fix = f"pass --num-workers {places}"
    elif each and max(gpus, default=0) == 0:
        fix = "pass --gpus-per-worker 0 to score on CPUs, or the --ray-address of a cluster that has GPUs"
    elif each > max(gpus, default=0):
        fix = f"pass --gpus-per-worker {max(gpus)} or less"
    else:
        fix = "start Ray with at least one CPU on each node"
    gpus_and_cpus = " and ".join(counted(int(total.get(kind, 0)), kind) for kind in ("GPU", "CPU"))
    raise ConfigError(
        f"the cluster has {gpus_and_cpus} on {counted(len(nodes), 'node')}, which is room for {places} of "
        f"{counted(workers, 'worker')} with {counted(each, 'GPU')} and 1 CPU each",
        where=config.ray_address or os.environ.get("RAY_ADDRESS") or "this machine",
        why="Ray would wait for the rest without saying so",
        fix=fix,
    )


def _run_all(ray: Any, config: PrecomputeConfig, work: Work, held: _HeldSignals) -> dict[int, Exception]:
    """Run all workers to their ends.

    Returns:
        Number of a worker that failed at every attempt, to its last error.

    Raises:
        DpoOptError: A worker was refused. The others would be too, so they are stopped.
    """
    # A task and not an actor: a worker is one call, which Ray repeats after a crash. An actor keeps state
    # between calls, and a worker has none, because its commits are in the folder.
    as_a_task = ray.remote(
        num_cpus=1,
        num_gpus=config.gpus_per_worker,
        # The process ends with the worker, so that no engine keeps its GPU memory.
        max_calls=1,
        max_retries=_RESTARTS,
        # An engine may raise any error, and the next attempt may succeed. Our own errors are returned.
        retry_exceptions=True,
    )
    task = as_a_task(_work_in_a_process)
    # Absolute, because a node's processes may run in another folder.
    shared = {"launcher": "local", "shards": config.shards.absolute()}
    numbers: dict[Any, int] = {}
    failures: dict[int, Exception] = {}
    try:
        for i in range(config.num_workers or 1):
            worker = config.model_copy(update={**shared, "worker_index": i})
            numbers[task.remote(work, worker, Path.cwd())] = i
        while numbers:
            held.deliver()
            some, _ = ray.wait(list(numbers), timeout=_SECONDS_BETWEEN_LOOKS)
            for ended in some:
                number = numbers.pop(ended)
                try:
                    refusal = ray.get(ended)
                except ray.exceptions.RayError as error:
                    failures[number] = error
                else:
                    if refusal is not None:
                        raise refusal
    finally:
        _stop(ray, list(numbers))
    return failures


def _work_in_a_process(work: Work, config: PrecomputeConfig, folder: Path) -> DpoOptError | None:
    """Run one worker on the node where Ray placed it.

    Returns:
        An error that stops the whole run. It is not raised, because Ray would retry the worker and wrap it.
    """
    # Data and model may be relative paths. Without the folder they are absolute, or reported as missing.
    with contextlib.suppress(OSError):
        os.chdir(folder)
    if config.gpus_per_worker == 0:
        # Ray does not hide GPUs from a task that asked for none: all such tasks would use the first GPU.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        if not (config.shards / PLAN).is_file():
            # The worker would plan again, in a folder of its own node that no other node sees.
            raise ConfigError(
                f"the node {socket.gethostname()} does not see the folder",
                where=str(config.shards),
                why="what it scores would stay on that node",
                fix="pass a --shards folder on storage that all nodes of the cluster share",
            )
        work(config)
    except Preempted:
        raise
    except DpoOptError as error:
        return error
    return None


def _stop(ray: Any, tasks: list[Any]) -> None:
    """Kill the workers that still run. Shards that they have not committed are left for the next run."""
    for task in tasks:
        ray.cancel(task, force=True)
    if tasks:
        # The user may use the GPUs as soon as this command ends.
        ray.wait(tasks, num_returns=len(tasks), timeout=_SECONDS_TO_STOP)


def _raise_first(failures: dict[int, Exception]) -> None:
    number, error = next(iter(failures.items()))
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        raise cause from error
    reason = first_line(error, lines=1, named=False)
    raise DpoOptError(
        f"worker {number} was lost {_RESTARTS + 1} times: {reason}",
        why="shards are left, and no worker is",
        fix="see worker-* and raylet.* in /tmp/ray/session_latest/logs on its node (often it ran out of "
        "memory), then run the same command again: it goes on where this one stopped",
    ) from error
