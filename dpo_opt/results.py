"""How a command says what came out: words for people, JSON for machines."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import click
from pydantic import BaseModel

from dpo_opt.schemas.safe_text import printable


def show(result: dict[str, Any], as_json: bool) -> None:
    """Print a result."""
    if as_json:
        click.echo(json.dumps(result, indent=1, default=_plain))
        return
    known = {name: value for name, value in result.items() if value is not None}
    width = max(len(name) for name in known)
    for name, value in known.items():
        # Names are others' as well: each stays on its line.
        click.echo(f"{name:<{width}}  {printable(' '.join(_words(value).splitlines()))}")


def say(lines: Iterable[str]) -> None:
    """Print lines in which others' names may stand: none of them steers the terminal."""
    for line in lines:
        click.echo(printable(line))


def table(header: list[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """Lines of a table.

    Args:
        header: Names of the columns. Numbers stand below a name, and end on the right. Words stand in the
            first column, and in one without a name; they begin on the left.
        rows: A cell for each column; an int gets its thousands separated.
    """
    cells = [header, *([f"{c:,}" if isinstance(c, int) else str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        columns = zip(row, widths, header, strict=True)
        yield "  ".join(
            cell.rjust(width) if name and i else cell.ljust(width)
            for i, (cell, width, name) in enumerate(columns)
        ).rstrip()


def _words(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(member)}" for name, member in value.items()) or "none"
    if isinstance(value, list):
        return "; ".join(map(_words, value)) or "none"
    return str(value)


def _plain(value: object) -> object:
    return value.model_dump() if isinstance(value, BaseModel) else str(value)
