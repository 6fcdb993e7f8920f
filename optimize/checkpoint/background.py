"""Saves in the background: a run goes on with its next step while a thread copies and writes a checkpoint.

Weights and optimizer state change only in an update. So the thread copies them to main memory while the next
step computes its gradients, and only an update that comes sooner waits for the copy.

torch.distributed.checkpoint's ``async_save`` is not used: it copies before it returns, hashes nothing, so
that every file would be read again, and does not make a whole folder appear at once.
"""

import threading
from collections.abc import Callable
from types import TracebackType

from dpo_opt.optimize.checkpoint.saving import Snapshot


class BackgroundSaves:
    """Writes one snapshot at a time in a thread of its own. Leaving its block waits for the last one.

    Args:
        failed: Called in the thread when a save failed. The error itself is raised by ``wait``.
    """

    def __init__(self, failed: Callable[[], None]) -> None:
        self._failed = failed
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._copied = threading.Event()
        self._copied.set()

    def begin(self, snapshot: Snapshot, write: Callable[[Snapshot], None]) -> None:
        """Copy a snapshot and write the copy.

        Args:
            snapshot: Must not change before ``wait_for_copy`` returns.
            write: Called in the thread, with the copy.

        Raises:
            Exception: See ``wait``.
        """
        self.wait()
        self._copied.clear()
        # If the program ends without waiting, the save must not hold it: a part of one is no checkpoint.
        self._thread = threading.Thread(target=self._save, args=(snapshot, write), daemon=True)
        self._thread.start()

    def wait_for_copy(self) -> None:
        """Return when the run may change its weights and its optimizer state."""
        self._copied.wait()

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            Exception: The error of the last save, once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _save(self, snapshot: Snapshot, write: Callable[[Snapshot], None]) -> None:
        try:
            try:
                copy = snapshot.copied()
            finally:
                self._copied.set()
            write(copy)
        # A thread has nobody to raise to: whatever ended it is raised by the next `wait`.
        except BaseException as error:
            self._error = error
            self._failed()

    def __enter__(self) -> "BackgroundSaves":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception:
            # What ended the run comes first.
            if error is None:
                raise
