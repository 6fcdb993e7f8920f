"""Stops training early: a signal or a failure is noted, and the loop stops at the next safe point.

A handler that raised an exception could leave the weights of one step with the optimizer state of another. So
the handler only notes the signal, and the loop checks for it where everything is consistent.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from dpo_opt.optimize.processes.distributed import World, least_of_ranks

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequested(Exception):
    """Raised by ``StopSignals.check``; the loop then saves a checkpoint and ends."""


class StopSignals:
    """Which signal or failure asked this process to stop, if any."""

    def __init__(self) -> None:
        self.received: str | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        self.request(signal.Signals(number).name)

    def request(self, reason: str) -> None:
        """Ask the run to stop; from any thread."""
        self.received = reason

    def check(self, world: World, *, due: bool = False) -> bool:
        """Stop if any process of the run was asked to. Every process must call this.

        Args:
            world: The run's processes.
            due: Whether this process would save now. It is exchanged here, because a GPU waits for each
                exchange.

        Returns:
            Whether any process would save now.

        Raises:
            StopRequested: One of the processes was asked to stop.
        """
        stop, save = -2, -1
        asked = least_of_ranks(stop if self.received else save if due else 0, world)
        if asked == stop:
            raise StopRequested(self.received or "another process's signal")
        return asked == save


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
