"""A scheduler takes the machine back: asked now and then, never in the middle of an update or of a file.

A handler that raised could leave weights of one step beside the optimizer state of another. So here a signal
is only noted, and the loop asks where everything is consistent.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from dpo_opt.optimize.processes.distributed import World, any_rank

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequested(Exception):
    """Raised by ``StopSignals.check``; the loop saves and leaves."""


class StopSignals:
    """Which signal asked this process to stop, if any."""

    def __init__(self) -> None:
        self.received: str | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        self.received = signal.Signals(number).name

    def check(self, world: World) -> None:
        """Go on, or not: all processes of the run alike, so all of them must ask.

        Raises:
            StopRequested: A signal came to one of them.
        """
        if any_rank(self.received is not None, world):
            raise StopRequested(self.received or "another process's signal")


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Note SIGTERM and SIGUSR1 while the block runs, instead of dying of them.

    Only the main thread may ask for signals; in another one nothing is noted.
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
