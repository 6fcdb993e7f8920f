"""A scheduler takes the machine back: stop at once, leave nothing half done, say so by the exit code."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from dpo_opt.schemas.errors import Preempted

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@contextlib.contextmanager
def preemptible(resume: str) -> Iterator[None]:
    """Turn SIGTERM and SIGUSR1 into ``Preempted`` while the block runs.

    What is being written then is abandoned under its private name; committed shards are whole.

    Args:
        resume: The command that goes on.
    """

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Preempted(
            f"stopped by {signal.Signals(number).name}",
            why="finished shards are committed; the one in work is abandoned",
            fix=resume,
        )

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
