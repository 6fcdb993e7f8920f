"""How a long job reports its progress; the command line draws bars or prints lines from it."""

from typing import Protocol


class Progress(Protocol):
    """One counted piece of work."""

    def start(self, what: str, *, total: int | None, unit: str, done: int = 0) -> None:
        """Begin counting.

        Args:
            what: What is done, in a word.
            total: How many units there are; None where nobody knows.
            unit: What is counted.
            done: Units that were done before, by whomever; they count, and no rate is made of them.
        """
        ...

    def advance(self, count: int, note: str = "") -> None:
        """Report that ``count`` more units are done; ``note`` is shown next to the rate."""
        ...

    def finish(self) -> None: ...

    def say(self, line: str) -> None:
        """One line that a person should read, between the counts."""
        ...


class Silent:
    """Shows nothing: the default of the Python API."""

    def start(self, what: str, *, total: int | None, unit: str, done: int = 0) -> None:
        pass

    def advance(self, count: int, note: str = "") -> None:
        pass

    def finish(self) -> None:
        pass

    def say(self, line: str) -> None:
        pass
