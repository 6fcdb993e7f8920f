"""What a person sees while a job runs: a bar on a terminal, a plain line now and then elsewhere.

All of it goes to stderr, so that stdout holds results only.
"""

import sys
import time

import click

from dpo_opt.schemas.progress import Progress as ProgressProtocol
from dpo_opt.schemas.safe_text import printable

_SECONDS_BETWEEN_LINES = 10.0


def watched() -> ProgressProtocol:
    """A bar where stderr is a terminal, lines where it is a file or a pipe."""
    return _Bar() if sys.stderr.isatty() else _Lines()


def duration(seconds: float) -> str:
    """A time as a person says it, in its two largest units: ``48 s``, ``1 h 20 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class _Lines:
    def start(self, what: str, *, total: int | None, unit: str, done: int = 0) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done = self._before = done
        self._begin = self._last = time.monotonic()

    def advance(self, count: int, note: str = "") -> None:
        self._done += count
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES and self._done != self._total:
            return
        self._last = now
        rate = (self._done - self._before) / max(now - self._begin, 1e-9)
        done, left = str(self._done), ""
        if self._total is not None:
            done += f"/{self._total}"
            left = f", {duration((self._total - self._done) / rate if rate else 0.0)} left"
        print(
            f"{self._what}: {done} {self._unit}, {rate:.1f} {self._unit}/s{left}"
            + (f", {printable(note)}" if note else ""),
            file=sys.stderr,
            flush=True,
        )

    def finish(self) -> None:
        pass

    def say(self, line: str) -> None:
        click.echo(printable(line), err=True)


class _Bar:
    def start(self, what: str, *, total: int | None, unit: str, done: int = 0) -> None:
        self._unit = unit
        self._begin = time.monotonic()
        self._done = 0
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(stderr=True),
        )
        self._bar.start()
        # However the command ends: a bar that is left running leaves the terminal without a cursor.
        context = click.get_current_context(silent=True)
        if context is not None:
            context.call_on_close(self._bar.stop)
        self._task = self._bar.add_task(what, total=total, completed=done, rate="", note="")

    def advance(self, count: int, note: str = "") -> None:
        self._done += count
        rate = self._done / max(time.monotonic() - self._begin, 1e-9)
        self._bar.update(self._task, advance=count, rate=f"{rate:.1f} {self._unit}/s", note=printable(note))

    def finish(self) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        # A console that draws a bar writes above it; before there is one, a plain line will do.
        click.echo(printable(line), err=True)
