"""What a long job tells whoever watches it; the front door draws bars or lines from this."""

from typing import Protocol


class Progress(Protocol):
    """One counted piece of work."""

    def start(self, what: str, *, total: int | None, unit: str) -> None:
        """Begin counting ``total`` units of ``what``; None where nobody knows how many there are."""
        ...

    def advance(self, count: int, note: str = "") -> None:
        """``count`` more units are done; ``note`` is shown beside the rate."""
        ...

    def finish(self) -> None: ...

    def say(self, line: str) -> None:
        """One line that a person should read, between the counts."""
        ...


class Silent:
    """Progress that nobody watches: the default of the Python API."""

    def start(self, what: str, *, total: int | None, unit: str) -> None:
        pass

    def advance(self, count: int, note: str = "") -> None:
        pass

    def finish(self) -> None:
        pass

    def say(self, line: str) -> None:
        pass
