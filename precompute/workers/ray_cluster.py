"""Workers as Ray tasks: Ray finds them places, and starts again those that were killed or lost with a node.

Only settings travel through Ray. Pairs and log-probs go to the folder of shards, which every node must see;
what a worker has committed there is not lost with it.
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
from dpo_opt.schemas.errors import ConfigError, DpoOptError, Preempted, first_line
from dpo_opt.schemas.manifest import PLAN

# A worker that has died this often is on a bad node or dies by itself; the others take its shards.
_RESTARTS = 5
# Nothing but settings and errors goes through it; by default Ray would reserve 30 % of the memory.
_OBJECT_STORE_BYTES = 100 * 2**20
_SECONDS_TO_STOP = 10.0
_SECONDS_TO_ANSWER = 10.0
_SECONDS_BETWEEN_LOOKS = 0.5

Work = Callable[[PrecomputeConfig], int]


def run_workers(config: PrecomputeConfig, work: Work) -> None:
    """Run ``config.num_workers`` workers on Ray until every shard is scored.

    A process that is connected to a cluster already uses that connection and keeps it. Otherwise the cluster
    is the one at ``ray_address`` or in ``RAY_ADDRESS``, which goes on running, or one of this machine, which
    ends with this call.

    Args:
        config: What to score; its folder is planned.
        work: What one worker does; each calls it in a process of its own, with its ``worker_index``.

    Raises:
        ConfigError: Ray is not installed or not reached, has no room for the workers, or its nodes do not see
            the folder.
        DpoOptError: The first that a worker raised, unchanged; or a worker was lost for good and shards are
            left. Any other exception that a worker raised at every attempt is raised if shards are left.
    """
    ray = _import_ray()
    # Ray's reports of lost workers go to stdout, whatever its settings, and stdout is for results.
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
    """SIGTERM and SIGUSR1 wait for ``deliver``: what their handlers raise in Ray's code Ray prints and drops.

    Only handlers that the caller set are held back, and only in the main thread, which alone runs them.
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
        """Take the signals back from whoever else took them."""
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
    # Ray itself would look for any cluster of this machine before it starts one.
    address = config.ray_address or os.environ.get("RAY_ADDRESS") or "local"
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # As many workers as were asked for, however many cores there are: the cluster is theirs alone.
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
            reason = first_line(error, named=False)
            if address == "local":
                raise ConfigError(f"Ray does not start on this machine: {reason}") from error
            raise ConfigError(
                f"no connection to Ray: {reason}",
                where=address,
                fix="check with `ray status --address ADDRESS`, then pass --ray-address or set RAY_ADDRESS",
            ) from error
        except SystemExit:
            # Raised by the handler that Ray puts in place of any other as soon as it starts.
            held.deliver(signal.SIGTERM)
            raise
        # Without a handler of the caller's, Ray's is better than none, because it lets this block end.
        held.hold()
        held.deliver()
        yield
    finally:
        # Ends a cluster that init started, and only disconnects from any other.
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Ray itself would try for 5 minutes to reach a wrong address.

    Raises:
        OSError: Nobody listens there.
        ValueError: It is no ``HOST:PORT``.
    """
    if address in ("local", "auto") or "://" in address:
        return
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_ANSWER).close()


def _require_room(ray: Any, config: PrecomputeConfig) -> None:
    """Refuse what Ray would wait for without an end.

    Raises:
        ConfigError: Not all workers can have their GPUs at once, or none of them has a place.
    """
    workers, each = config.num_workers or 1, config.gpus_per_worker
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # By node: the GPUs of one worker cannot be on two.
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    places = sum(min(c, g // each) if each else c for c, g in zip(cpus, gpus, strict=True))
    # Workers that only compute on cores may wait for one another: none of them waits for ever.
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
    raise ConfigError(
        f"the cluster has {total.get('GPU', 0):g} GPUs and {total.get('CPU', 0):g} CPUs on {len(nodes)} "
        f"nodes, which is room for {places} of {workers} workers with {each} GPUs and 1 CPU each",
        where=config.ray_address or os.environ.get("RAY_ADDRESS") or "this machine",
        why="Ray would wait for the rest without saying so",
        fix=fix,
    )


def _run_all(ray: Any, config: PrecomputeConfig, work: Work, held: _HeldSignals) -> dict[int, Exception]:
    """Run all workers to their ends.

    Returns:
        Worker to what it failed with at every attempt.

    Raises:
        DpoOptError: What a worker says that the others would say too; they are stopped.
    """
    # A task and not an actor: a worker is one call, which Ray repeats whole after a crash. An actor keeps
    # state between calls, and there is none: what counts is in the folder.
    as_a_task = ray.remote(
        num_cpus=1,
        num_gpus=config.gpus_per_worker,
        # The process ends with the worker: nothing of an engine stays behind on a GPU.
        max_calls=1,
        max_retries=_RESTARTS,
        # An engine's errors may be of any kind, and may pass; those we explain are returned, not raised.
        retry_exceptions=True,
    )
    task = as_a_task(_work_in_a_process)
    # Seen from wherever a node's processes stand.
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
    """One worker, where Ray put it.

    Returns:
        What stops the whole run: as a value it is neither retried nor wrapped by Ray.
    """
    # Data and model may be named by relative paths. A node without that folder needs none, or says so.
    with contextlib.suppress(OSError):
        os.chdir(folder)
    if config.gpus_per_worker == 0:
        # Ray hides GPUs from tasks with some, not from those with none, which would all take the first.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        if not (config.shards / PLAN).is_file():
            # A worker would plan in a folder of its own node, whose shards nobody finds.
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
    """Kill workers that are still at it; what they have not committed was not finished."""
    for task in tasks:
        ray.cancel(task, force=True)
    if tasks:
        # Whoever gets the error or the prompt back may use the GPUs at once.
        ray.wait(tasks, num_returns=len(tasks), timeout=_SECONDS_TO_STOP)


def _raise_first(failures: dict[int, Exception]) -> None:
    number, error = next(iter(failures.items()))
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        raise cause from error
    reason = first_line(error, named=False)
    raise DpoOptError(
        f"worker {number} was lost {_RESTARTS + 1} times: {reason}",
        why="shards are left, and no worker is",
        fix="see worker-* and raylet.* in /tmp/ray/session_latest/logs on its node (often it ran out of "
        "memory), then run the same command again: it goes on where this one stopped",
    ) from error
