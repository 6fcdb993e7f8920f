"""Handles SIGTERM and SIGUSR1 during training: a signal is noted, and the loop stops at the next safe point.

A handler that raised an exception could leave the weights of one step with the optimizer state of another. So
the handler only notes the signal, and the loop checks for it where everything is consistent.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from dpo_opt.optimize.processes.distributed import World, any_rank

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequested(Exception):
    """Raised by ``StopSignals.check``; the loop then saves a checkpoint and ends."""


class StopSignals:
    """Which signal asked this process to stop, if any."""

    def __init__(self) -> None:
        self.received: str | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        self.received = signal.Signals(number).name

    def check(self, world: World) -> None:
        """Stop if any process of the run received a signal. Every process must call this.

        Raises:
            StopRequested: A signal came to one of the processes.
        """
        if any_rank(self.received is not None, world):
            raise StopRequested(self.received or "another process's signal")


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Note SIGTERM and SIGUSR1 while the block runs; without this, they would kill the process.

    Python lets only the main thread set signal handlers; in other threads no signal is noted.
    """
    signals = StopSignals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, signals.note) for number in _SIGNALS}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
