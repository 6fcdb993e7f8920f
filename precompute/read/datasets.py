"""Preference data as one stream of pairs, numbered over all sources: what every command reads.

``sources`` finds the files, ``files`` divides them into rows, and ``rows`` makes pairs of a row. This module
joins the rows into one sequence, whose numbers stay the same while the data does.
"""

import hashlib
import json
from collections.abc import Iterator, Set
from typing import NamedTuple

import pyarrow as pa

from dpo_opt.precompute.config import DataConfig
from dpo_opt.precompute.read.files import read_blocks
from dpo_opt.precompute.read.row_blocks import Block, TextBlock
from dpo_opt.precompute.read.rows import Form, PromptRow, to_pairs, to_prompts
from dpo_opt.precompute.read.shape_parts import (
    ADDED_COLUMNS,
    CONVERSATION_KEYS,
    LATE_COLUMNS,
    RATINGS,
    Values,
    is_empty,
)
from dpo_opt.precompute.read.sources import Source, find_sources
from dpo_opt.precompute.read.strict_json import escape
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import PreferencePair

# Not in the digest of a bad row of a table, which early versions took without them; an id is left out there
# as it is of a good row.
_UNCOUNTED = LATE_COLUMNS.union(RATINGS, RATINGS.values(), ["id"]) - {"score_chosen", "score_rejected"}
_OPTIONAL_CONTENT = ("tools", "chat_template_kwargs")


class BadRow(NamedTuple):
    """A row that is no pair. It has a number too, so that the other rows keep theirs."""

    row: int
    error: DataError
    content: bytes
    """The bytes of its text, or those values of a table's row that can be read."""


class NotInShare(NamedTuple):
    """A pair that ``--data-share`` leaves out. It has a number, so that the others keep the source's."""

    row: int
    pair_digest: bytes


Row = PreferencePair | BadRow | NotInShare


class BadFile(NamedTuple):
    """A file that cannot be read, or not to its end."""

    source: int
    error: DataError


class Reading(NamedTuple):
    """How the rows of one source are read; small enough to send along with every block."""

    source: int
    """Index of the source."""
    column: dict[str, str]
    share: float
    first: tuple[Form, str] | None
    """Form and name of the source's first good row."""
    ignored: frozenset[str] = frozenset()
    """Columns that are read as if they were not there."""

    @property
    def counts_ahead(self) -> bool:
        """Every row is one number, so that rows can be skipped without being parsed."""
        return self.first is not None and not self.first[0].ranked


def read_pairs(config: DataConfig, *, start: int = 0, stop: int | None = None) -> Iterator[PreferencePair]:
    """The pairs, in order, without those that are not in the share.

    Args:
        config: Which data, and how it is read.
        start: First row to read. Rows before it are counted, not checked; blank lines are no rows.
        stop: Row to stop before; the end by default.

    Raises:
        DataError: A row or a file cannot be used; the message names the line and the way out.
    """
    for item in scan_pairs(config, start=start, stop=stop):
        if isinstance(item, BadRow):
            raise item.error
        yield item


def scan_pairs(
    config: DataConfig, *, start: int = 0, stop: int | None = None
) -> Iterator[PreferencePair | BadRow]:
    """Like ``read_pairs``, but a bad row is yielded with its error, and reading continues.

    Raises:
        ConfigError: The sources cannot be what is meant.
        DataError: A file cannot be read, or not to its end.
    """
    row = 0
    for item in scan_blocks(config):
        if isinstance(item, BadFile):
            raise item.error
        block, reading = item
        if stop is not None and row >= stop:
            return
        if reading.counts_ahead and row + len(block) <= start:
            row += len(block)
            continue
        for found in parse_block(block, reading):
            if stop is not None and row >= stop:
                return
            if row >= start and not isinstance(found, NotInShare):
                yield found._replace(row=row)
            row += 1


def scan_blocks(config: DataConfig) -> Iterator[tuple[Block, Reading] | BadFile]:
    """All data as raw blocks, each with how to read it. Reading continues after a file that cannot be read.

    Raises:
        ConfigError: The sources cannot be what is meant.
        DataError: A source does not exist.
    """
    for number, source in enumerate(find_sources(config)):
        reading = Reading(number, config.column, source.share, None, frozenset(config.ignore_column))
        for item in _source_blocks(source, config):
            if isinstance(item, DataError):
                yield BadFile(number, item)
                continue
            if reading.first is None:
                reading = reading._replace(first=_first_form(item, reading))
            yield item, reading


def parse_block(block: Block, reading: Reading) -> Iterator[Row]:
    """The pairs of a block, in the share or not, and its bad rows; all of them numbered 0."""
    for number, (where, load) in enumerate(block.rows()):
        try:
            pairs, form = to_pairs(_renamed(load(), reading, where), where=where, column=reading.column)
            if reading.first is not None and form.rules != reading.first[0].rules:
                raise _other_form(form, where, reading.first)
        except DataError as error:
            yield BadRow(0, error, _content(block, number))
            continue
        if reading.share == 1:
            yield from pairs
            continue
        for pair in pairs:
            digest = row_digest(pair)
            yield pair if _unit_interval(digest) < reading.share else NotInShare(0, digest)


def read_prompts(config: DataConfig) -> Iterator[PreferencePair | PromptRow]:
    """The pairs, or the prompts of rows without completions, in order.

    Raises:
        DataError: A row has no usable prompt, or a file cannot be read.
    """
    for item in scan_blocks(config):
        if isinstance(item, BadFile):
            raise item.error
        block, reading = item
        for where, load in block.rows():
            yield from to_prompts(_renamed(load(), reading, where), where=where, column=reading.column)


def row_digest(item: Row) -> bytes:
    """SHA-256 of a row's content, for the digest of a dataset; its place does not count.

    The digest of a bad row is that of its defect's kind and its bytes. The error's message does not count,
    because it may name a file, or be worded by Python. A pair that is not in the share has another digest
    than one that is.
    """
    if isinstance(item, BadRow):
        content = f"{item.error.kind}\n".encode() + item.content
    elif isinstance(item, NotInShare):
        content = b"not_in_share\n" + item.pair_digest
    else:
        content = row_content(item)
    return hashlib.sha256(content).digest()


def message_digest(item: Row) -> bytes:
    """``row_digest`` as early versions took it: a bad row's is that of its error's message."""
    if not isinstance(item, BadRow):
        return row_digest(item)
    return hashlib.sha256(json.dumps({"bad_row": item.error.what}).encode()).digest()


def row_content(item: PreferencePair) -> bytes:
    """A pair's content, in one canonical spelling.

    Weight, margin and id are left out, because they may change without scoring again.
    """
    content: dict[str, object] = {"prompt": item.prompt, "source": item.source}
    if item.label is None:
        content |= {"chosen": item.chosen, "rejected": item.rejected}
    else:
        content |= {"completion": item.chosen, "label": item.label}
    content |= {name: value for name in _OPTIONAL_CONTENT if (value := getattr(item, name)) is not None}
    return json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def _content(block: Block, number: int) -> bytes:
    if isinstance(block, TextBlock):
        return block.texts[number].strip()
    found: dict[str, object] = {}
    unread = _not_loaded(block.batch.schema)
    for name, column in zip(block.batch.schema.names, block.batch.columns, strict=True):
        if name in _UNCOUNTED or name in unread:
            continue
        try:
            value = column[number].as_py()
        except (ValueError, OverflowError, pa.ArrowException):
            value = {"unreadable": str(column.type)}
        # Early versions did not load them.
        if name not in ADDED_COLUMNS or not is_empty(value):
            found[name] = value
    return json.dumps(found, sort_keys=True, default=str).encode()


def _not_loaded(schema: pa.Schema) -> Set[str]:
    """The conversation of a table of pairs, which early versions loaded beside sides of one message only."""
    if not {"chosen", "rejected"} <= set(schema.names):
        return frozenset()
    was_loaded = pa.types.is_struct(schema.field("chosen").type) and "prompt" not in schema.names
    return frozenset() if was_loaded else frozenset(CONVERSATION_KEYS)


def _source_blocks(source: Source, config: DataConfig) -> Iterator[Block | DataError]:
    for file in source.files:
        try:
            yield from read_blocks(file, column=config.column, ignored=frozenset(config.ignore_column))
        except DataError as error:
            yield error


def _first_form(block: Block, reading: Reading) -> tuple[Form, str] | None:
    for where, load in block.rows():
        try:
            values = _renamed(load(), reading, where)
            return to_pairs(values, where=where, column=reading.column)[1], where
        except DataError:
            continue  # it is reported when the block is parsed
    return None


def _renamed(values: Values, reading: Reading, where: str) -> Values:
    column = reading.column
    if reading.ignored:
        values = {key: value for key, value in values.items() if key not in reading.ignored}
    if not column:
        return values
    for part, key in column.items():
        if key not in values and part not in values:
            raise DataError(
                f'the key "{escape(key)}" is missing, from which --column reads "{part}"',
                where=where,
                why="a misspelt name would leave the part out in silence",
                fix="correct --column, or the row",
                kind="missing_key",
            )
    others = {key: value for key, value in values.items() if key not in column.values()}
    return others | {part: values[key] for part, key in column.items() if key in values}


def _unit_interval(digest: bytes) -> float:
    return int.from_bytes(digest[:8], "big") / 2**64


def _other_form(form: Form, where: str, first: tuple[Form, str]) -> DataError:
    first_form, first_where = first
    return DataError(
        f"this row holds {form.name}, but {first_where} holds {first_form.name}",
        where=where,
        why="the two forms become token ids by different rules",
        fix="give each form a --data of its own, or convert one of them",
        kind="other_form",
    )
