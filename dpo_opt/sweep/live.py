"""What a person sees while a sweep runs: a table on a terminal, elsewhere lines as runs begin and end."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click

from dpo_opt.optimize.run_folder import RunFolder
from dpo_opt.results import table
from dpo_opt.schemas.safe_text import printable
from dpo_opt.sweep.grid import SweepRun
from dpo_opt.sweep.outcomes import Row, outcomes
from dpo_opt.sweep.processes import Ended, last_error

_SHOWN = (
    ("eval_rewards/accuracies", "held-out accuracy", "{:.1%}"),
    ("eval_rewards/margins", "held-out margin", "{:+.3f}"),
    ("eval_rewards/chosen", "held-out reward of chosen", "{:+.3f}"),
    ("loss", "last loss", "{:.4f}"),
)


def outcome_lines(rows: Sequence[Row]) -> Iterator[str]:
    """The rows of a sweep as a table of words."""
    shown = [column for column in _SHOWN if any(row.get(column[0]) is not None for row in rows)]
    yield from table(
        ["run", "state", *(words for _, words, _ in shown)],
        [[row["run"], row["state"], *(_cell(row, name, form) for name, _, form in shown)] for row in rows],
    )


@contextlib.contextmanager
def watching(runs: Sequence[SweepRun]) -> Iterator["_Lines | _Table"]:
    """Show a sweep while the block runs, on stderr."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), auto_refresh=False) as live:
        yield _Table(runs, live)


class _Lines:
    def __init__(self) -> None:
        self._begun: set[str] = set()

    def look(self, at_work: Sequence[SweepRun]) -> None:
        for run in at_work:
            if run.name not in self._begun:
                self._begun.add(run.name)
                click.echo(f"{printable(run.name)}: begins", err=True)

    def ended(self, ended: Ended) -> None:
        _say_ended(ended)


class _Table:
    def __init__(self, runs: Sequence[SweepRun], live: Any) -> None:
        self._runs, self._live = runs, live
        # Of the runs that are not at work: their files are read once, and not at every look.
        self._rows = outcomes(runs)

    def look(self, at_work: Sequence[SweepRun]) -> None:
        from rich.text import Text

        names = {run.name for run in at_work}
        rows = []
        for row, run in zip(self._rows, self._runs, strict=True):
            newest = RunFolder(run.config.output_dir).last_metrics() if run.name in names else {}
            if run.name in names:
                step = f"step {newest['step']}" if newest else "starts"
                row = row | {"state": step, "loss": newest.get("loss")}
            rows.append(row)
        # A Text is never read as markup.
        self._live.update(Text("\n".join(map(printable, outcome_lines(rows)))), refresh=True)

    def ended(self, ended: Ended) -> None:
        self._rows = outcomes(self._runs)
        if ended.code != 0:
            _say_ended(ended)


def _say_ended(ended: Ended) -> None:
    if ended.code == 0:
        click.echo(f"{printable(ended.run.name)}: finished", err=True)
    else:
        said = printable(last_error(ended))
        click.echo(f"{printable(ended.run.name)}: exit code {ended.code}: {said}", err=True)


def _cell(row: Row, name: str, form: str) -> str:
    value = row.get(name)
    return "" if value is None else form.format(value)
