"""A function over many blocks, in order, on as many processes as are worth starting."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from typing import TypeVar

from dpo_opt.schemas.errors import DpoOptError

Task = TypeVar("Task")
Result = TypeVar("Result")

# Starting processes takes about a second; so much is done at once before any is started.
_INLINE_TASKS = 6
_TASKS_AHEAD = 3  # per process: enough that none waits, few enough that memory stays flat


def map_in_order(
    function: Callable[[Task], Result], tasks: Iterable[Task], *, processes: int
) -> Iterator[Result]:
    """``map``, with the tasks after the first few spread over processes.

    Args:
        function: A module-level function; its results come back in the tasks' order.
        tasks: Taken from as results are asked for, so that few of them are in memory.
        processes: How many; 0 for one per core that this process may use.

    Raises:
        DpoOptError: A process was killed.
    """
    tasks = iter(tasks)
    processes = processes or len(os.sched_getaffinity(0))
    if processes == 1:
        yield from map(function, tasks)
        return
    yield from map(function, islice(tasks, _INLINE_TASKS))
    ahead = list(islice(tasks, 1))
    if not ahead:
        return
    # Spawned, because a fork of a process with threads may never wake up.
    with ProcessPoolExecutor(processes, get_context("spawn"), _begin) as pool:
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
    # Every core has its process already; a tokenizer's own threads would only be in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
