"""A function over many blocks, in order, on as many processes as are worth starting."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import forkserver, get_context
from typing import TypeVar

from dpo_opt.schemas.errors import DpoOptError

Task = TypeVar("Task")
Result = TypeVar("Result")

# To start processes takes a second or more. This process works for so long before it starts them, and as long
# again while they start.
_INLINE_TASKS = 3
_TASKS_AHEAD = 3  # per process: enough that none waits, few enough that memory stays flat


def map_in_order(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    processes: int,
    preload: Sequence[str] = (),
) -> Iterator[Result]:
    """``map``, with the tasks after the first few spread over processes.

    Args:
        function: A module-level function; its results come back in the tasks' order.
        tasks: Taken from as results are asked for, so that few of them are in memory.
        processes: How many; 0 for one per core that this process may use.
        preload: Modules that the function imports late; they are imported once for all processes.

    Raises:
        DpoOptError: A process was killed.
    """
    tasks = iter(tasks)
    processes = processes or len(os.sched_getaffinity(0))
    if processes == 1:
        yield from map(function, tasks)
        return
    yield from map(function, islice(tasks, _INLINE_TASKS))
    ahead = list(islice(tasks, _INLINE_TASKS))
    if not ahead:
        return
    # Not forked from this process, whose threads may hold locks that no fork would ever release.
    context = get_context("forkserver")
    context.set_forkserver_preload([function.__module__, *preload])
    # It imports what it needs while this process continues alone.
    forkserver.ensure_running()
    yield from map(function, ahead)
    ahead = list(islice(tasks, 1))
    if not ahead:
        return
    with ProcessPoolExecutor(processes, context, _begin) as pool:
        waiting: deque[Future[Result]] = deque(pool.submit(function, task) for task in ahead)
        try:
            for task in tasks:
                waiting.append(pool.submit(function, task))
                if len(waiting) >= processes * _TASKS_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DpoOptError(
                "a process that parsed the data was killed",
                why="most often the machine ran out of memory",
                fix="pass --processes 1, or run it on a machine with more memory",
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin() -> None:
    # Every core has a process already, so a tokenizer's own threads would only slow each other down.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
