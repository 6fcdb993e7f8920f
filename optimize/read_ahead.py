"""Reading what comes next while what came before is used: a step should not wait for a file or a store."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

# A store answers late and serves several at once; on a disk one would do.
_THREADS = 4

K = TypeVar("K")
V = TypeVar("V")


def read_ahead(read: Callable[[K], V], keys: Iterable[K], *, ahead: int) -> Generator[V]:
    """``read(key)`` for every key, in the order of the keys, read by threads before it is asked for.

    The threads end with the last value, or when the iterator is closed or collected; what they are reading
    at that moment is finished first.

    Args:
        read: Called from several threads.
        keys: What to read.
        ahead: At most so many values are read, or being read, before they are asked for.

    Raises:
        Exception: What ``read`` raised, in the place of that key's value.
    """
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="dpo-opt-read-ahead")
    waiting: deque[Future[V]] = deque()
    try:
        for key in keys:
            waiting.append(pool.submit(read, key))
            if len(waiting) == ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
