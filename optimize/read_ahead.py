"""Reads values in threads before they are needed, so that a step does not wait for a disk or a store."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

# An object store answers slowly but serves several requests at once; for a disk one thread would do.
_THREADS = 4

K = TypeVar("K")
V = TypeVar("V")


def read_ahead(read: Callable[[K], V], keys: Iterable[K], *, ahead: int) -> Generator[V]:
    """``read(key)`` for every key, in the order of the keys; threads read ahead of the caller.

    The threads end after the last value, or when the iterator is closed or garbage-collected. Reads that are
    under way at that moment are finished first.

    Args:
        read: Called from several threads.
        keys: What to read.
        ahead: At most this many values are read, or being read, before the caller takes them.

    Raises:
        Exception: What ``read`` raised, when the caller reaches that key.
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
