"""Blocks of rows, as a file is read: still raw, so that another process can parse them."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import pyarrow as pa

from dpo_opt.precompute.read.sources import reason_of
from dpo_opt.precompute.read.strict_json import parse_object, quote, without_nulls
from dpo_opt.schemas.errors import DataError

LONGEST_ROW = 64 * 2**20
"""Bytes; a longer row is refused before it is in memory whole."""

Row = tuple[str, Callable[[], dict[str, object]]]
"""A row's name for messages, and a function that reads it, so that skipped rows cost nothing."""


class TextBlock(NamedTuple):
    """Consecutive rows as JSON text."""

    file: str
    prefix: str
    """The part of a row's name before its number."""
    numbers: Sequence[int]
    texts: list[bytes]

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self) -> Iterator[Row]:
        for number, text in zip(self.numbers, self.texts, strict=True):
            where = f"{self.prefix}{number}"
            yield where, functools.partial(parse_object, text, where=where)


class TableBlock(NamedTuple):
    """Consecutive rows of a table."""

    file: str
    prefix: str
    first: int
    batch: pa.RecordBatch

    def __len__(self) -> int:
        return int(self.batch.num_rows)

    def rows(self) -> Iterator[Row]:
        for i in range(len(self)):
            where = f"{self.prefix}{self.first + i}"
            yield where, functools.partial(_values, self.batch, i, where)


Block = TextBlock | TableBlock


def too_long(where: str, what: str, fix: str) -> DataError:
    """The refusal of a row that is longer than any pair."""
    return DataError(
        f"the {what} is longer than {LONGEST_ROW // 2**20} MiB",
        where=where,
        why="no pair is that long; the file may be of another format",
        fix=fix,
        kind="unreadable_file",
    )


def _with_objects(value: object, kind: pa.DataType) -> object:
    """A value whose maps are objects. Arrow gives lists of keys and values, which a template would write."""
    if isinstance(value, dict):
        return {key: _with_objects(member, kind.field(key).type) for key, member in value.items()}
    if not isinstance(value, list):
        return value
    if not pa.types.is_map(kind):
        return [_with_objects(member, kind.value_type) for member in value]
    members = {key: _with_objects(member, kind.item_type) for key, member in value}
    if len(members) < len(value):
        raise ValueError("a key twice in a map")
    return members


def _values(batch: pa.RecordBatch, i: int, where: str) -> dict[str, object]:
    name = ""
    try:
        values = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            value = column[i].as_py()
            if "map<" in str(column.type):
                value = _with_objects(value, column.type)
            values[name] = without_nulls(value)
        return values
    except UnicodeDecodeError as error:
        raise DataError(
            f"a text that is not valid UTF-8 at its byte {error.start + 1}",
            where=where,
            why="guessing another encoding would change the text",
            fix="write the file again with texts in UTF-8",
            kind="encoding",
        ) from error
    except (ValueError, OverflowError, pa.ArrowException) as error:
        # A date beyond the calendar, an unknown time zone, an object with a key twice.
        raise DataError(
            f'"{name}" holds a value that cannot be read ({reason_of(error)})',
            where=where,
            why=f"the column's type is {quote(str(batch.schema.field(name).type))}",
            fix="write the file again with this column as text or as numbers, or without it",
            kind="type",
        ) from error
