"""A file's rows, read strictly and in blocks: JSON Lines, JSON arrays and Parquet.

Memory stays flat whatever the file's size. A block is raw, so that another process can parse it; ``rows``
says what a row must be, this module says where rows come from.
"""

import codecs
import functools
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_opt.precompute.shapes import READ_KEYS
from dpo_opt.precompute.sources import SUFFIXES, open_file
from dpo_opt.precompute.strict_json import parse_object, quote
from dpo_opt.schemas.errors import DataError

LONGEST_ROW = 64 * 2**20
"""Bytes; a longer row is refused before it is in memory whole."""

_BLOCK_BYTES = 2**21
# A Parquet footer does not bound what a row takes in memory, so few rows at a time, and none too large.
_TABLE_ROWS = 256
_TABLE_BYTES = 2**27
_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}

Row = tuple[str, Callable[[], dict[str, object]]]
"""A row's name for messages, and what reads it, so that skipped rows cost nothing."""


class TextBlock(NamedTuple):
    """Consecutive rows as JSON text."""

    file: str
    prefix: str
    """What stands before a row's number in its name."""
    numbers: Sequence[int]
    texts: list[bytes]

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self) -> Iterator[Row]:
        for number, text in zip(self.numbers, self.texts, strict=True):
            where = f"{self.prefix}{number}"
            yield where, functools.partial(parse_object, text, where=where)


class TableBlock(NamedTuple):
    """Consecutive rows of a Parquet row group."""

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


def read_blocks(file: str, *, columns: frozenset[str] = frozenset()) -> Iterator[Block]:
    """The rows of one file, in order.

    Args:
        file: A path or URL whose name ends in one of ``SUFFIXES``.
        columns: Parquet columns to load beside those that some form of row reads.

    Raises:
        DataError: The file cannot be read, or not to its end, or has no rows.
    """
    suffix = next((suffix for suffix in SUFFIXES if file.endswith(suffix)), None)
    if suffix is None:
        raise DataError(
            "the file name does not say what the file holds",
            where=file,
            why=f"it must end in one of {', '.join(SUFFIXES)}",
            fix="rename the file, or convert it to JSON Lines: one JSON object per line",
            kind="unreadable_file",
        )
    blocks = _table_blocks(file, columns) if suffix == ".parquet" else _text_blocks(file, suffix)
    empty = True
    for block in blocks:
        empty = False
        yield block
    if empty:
        raise DataError(
            "the file has no rows",
            where=file,
            why="there is nothing to score",
            fix="check the command that wrote it",
            kind="unreadable_file",
        )


def _text_blocks(file: str, suffix: str) -> Iterator[TextBlock]:
    compression = next((name for end, name in _COMPRESSION.items() if suffix.endswith(end)), None)
    place = file
    try:
        with open_file(file) as raw, _decompressed(raw, compression) as stream:
            chunk = stream.read(_BLOCK_BYTES).removeprefix(codecs.BOM_UTF8)
            is_array = suffix.startswith(".json") and not suffix.startswith(".jsonl") and _begins_array(chunk)
            for block in (_elements if is_array else _lines)(file, chunk, stream):
                place = f"{block.prefix}{block.numbers[-1]}" if block.texts else place
                if block.texts:
                    yield block
    except _reading_errors() as error:
        raise DataError(
            f"cannot be read after this ({_reason(error)})",
            where=place,
            why="the file is cut off, damaged or not readable for this user",
            fix="copy or download the file again",
            kind="unreadable_file",
        ) from error


def _decompressed(raw: BinaryIO, compression: str | None) -> BinaryIO:
    if compression is None:
        return raw
    # Arrow's stream notices a cut-off end in both formats and reads files of several members.
    stream = pa.input_stream(pa.PythonFile(raw, mode="r"), compression=compression)
    return cast(BinaryIO, io.BufferedReader(stream, _BLOCK_BYTES))


def _begins_array(chunk: bytes) -> bool:
    return chunk.lstrip()[:1] == b"["


def _lines(file: str, chunk: bytes, stream: BinaryIO) -> Iterator[TextBlock]:
    """Lines with something on them; numbers are those of an editor, from 1."""
    number, rest = 1, b""
    while chunk:
        *lines, tail = chunk.split(b"\n")
        if lines:
            lines[0] = rest + lines[0]
            rest = b""
            numbered = [(i, line) for i, line in enumerate(lines, number) if line and not line.isspace()]
            number += len(lines)
            yield TextBlock(file, f"{file}:", [i for i, _ in numbered], [line for _, line in numbered])
        rest += tail
        if len(rest) > LONGEST_ROW:
            raise _too_long(f"{file}:{number}", "line", "write one JSON object per line")
        chunk = stream.read(_BLOCK_BYTES)
    if rest and not rest.isspace():
        yield TextBlock(file, f"{file}:", [number], [rest])


# Finds where elements end; a number of thousands of digits is refused with its element, not here.
_SCANNER = json.JSONDecoder(parse_int=str)


def _elements(file: str, chunk: bytes, stream: BinaryIO) -> Iterator[TextBlock]:
    """Elements of one array, counted from 1; what they hold is checked when they are parsed."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
    text = decoder.decode(chunk).lstrip().removeprefix("[")
    prefix, first = f"{file}:element ", 1
    while True:
        texts, position, failure, final = _whole_elements(text)
        if texts:
            yield TextBlock(file, prefix, range(first, first + len(texts)), texts)
        first += len(texts)
        text = text[position:]
        if text.startswith("]"):
            break
        if len(text) > LONGEST_ROW:
            raise _too_long(f"{prefix}{first}", "element", "write JSON Lines: one JSON object per line")
        # As much again as is left, so that a long element is not scanned many times over.
        wanted = min(max(_BLOCK_BYTES, len(text)), LONGEST_ROW + _BLOCK_BYTES - len(text))
        more = b"" if final else stream.read(wanted)
        if not more:
            raise _bad_array(f"{prefix}{first}", f"not readable as JSON from here ({quote(failure)})")
        text += decoder.decode(more)
    is_more = bool(text[1:].strip() or decoder.decode(b"", final=True))
    # To the file's very end, where a compressed one says whether it is whole.
    while not is_more and (more := stream.read(_BLOCK_BYTES)):
        is_more = bool(more.strip())
    if is_more:
        raise _bad_array(f"{prefix}{first}", "there is something after the end of the array")


def _whole_elements(text: str) -> tuple[list[bytes], int, str, bool]:
    """The elements that ``text`` holds whole, where the rest begins, why, and whether for good.

    Only after the end of an object is it sure that more text would not help.
    """
    texts: list[bytes] = []
    position = _after_space(text, 0)
    while position < len(text) and text[position] != "]":
        try:
            _, end = _SCANNER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            return texts, position, str(error), False
        after = _after_space(text, end)
        if after == len(text):
            break  # a number may go on
        if text[after] not in ",]":
            failure = "no comma and no end of the array follows the element"
            return texts, position, failure, text[end - 1] == "}"
        texts.append(text[position:end].encode("utf-8", errors="surrogateescape"))
        position = _after_space(text, after + 1) if text[after] == "," else after
    return texts, position, "the array does not end", False


def _bad_array(where: str, what: str) -> DataError:
    return DataError(
        what,
        where=where,
        why="what follows cannot be told apart into elements, so none of it would be read",
        fix="correct the file, or write JSON Lines, where a bad row stays alone",
        kind="unreadable_file",
    )


def _after_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _too_long(where: str, what: str, fix: str) -> DataError:
    return DataError(
        f"the {what} is longer than {LONGEST_ROW // 2**20} MiB",
        where=where,
        why="no pair is that long; the file may be of another format",
        fix=fix,
        kind="unreadable_file",
    )


def _table_blocks(file: str, columns: frozenset[str]) -> Iterator[TableBlock]:
    try:
        # pre_buffer holds a whole row group, which may be the whole file.
        with (
            open_file(file) as raw,
            pq.ParquetFile(
                raw, buffer_size=_BLOCK_BYTES, pre_buffer=False, page_checksum_verification=True
            ) as table,
        ):
            names = _columns(table.schema_arrow, file, columns)
            rows = 0
            for group in range(table.num_row_groups):
                for block in _group_blocks(file, raw, table, group, names):
                    rows += len(block)
                    yield block
            # A damaged count makes Arrow stop early and say nothing.
            if rows != table.metadata.num_rows:
                raise _not_parquet(file, f"{rows} of its {table.metadata.num_rows} rows can be read")
    except _reading_errors() as error:
        raise _not_parquet(file, _reason(error)) from error


def _not_parquet(file: str, reason: str) -> DataError:
    return DataError(
        f"not readable as Parquet ({reason})",
        where=file,
        why="the file is cut off, damaged or of another format",
        fix="copy or download the file again",
        kind="unreadable_file",
    )


def _group_blocks(
    file: str, raw: BinaryIO, table: pq.ParquetFile, group: int, names: list[str]
) -> Iterator[TableBlock]:
    prefix = f"{file}:row group {group}, row "
    # Arrow's reader refuses a damaged description of a column; asking for the description itself would end
    # the process.
    next(table.iter_batches(1, row_groups=[group], columns=names), None)
    rows = _rows_at_once(raw, table, group, names)
    first = 0
    for batch in table.iter_batches(rows, row_groups=[group], columns=names):
        if batch.nbytes > max(_TABLE_BYTES, LONGEST_ROW * batch.num_rows):
            raise _too_long(f"{prefix}{first}", "row", "check the command that wrote the file")
        if batch.num_rows:
            yield TableBlock(file, prefix, first, batch)
        first += batch.num_rows


def _rows_at_once(raw: BinaryIO, table: pq.ParquetFile, group: int, names: list[str]) -> int:
    """How many rows can be decoded together without an entry of a dictionary, repeated, filling the memory.

    A dictionary's size stands only in the header of its page: type and uncompressed size are the first two
    fields of a Thrift compact structure (parquet-format, PageHeader).
    """
    largest = 1  # bytes that a row of one column may take
    position = raw.tell()
    for i in range(len(table.schema)):
        if table.schema.column(i).path.split(".")[0] not in names:
            continue
        column = table.metadata.row_group(group).column(i)
        if column.dictionary_page_offset is not None:
            raw.seek(column.dictionary_page_offset)
            header = raw.read(16)
            if header[:1] == b"\x15" and header[2:3] == b"\x15":
                # A list repeats entries within a row too.
                per_row = -(-column.num_values // max(1, table.metadata.row_group(group).num_rows))
                largest = max(largest, _zigzag_varint(header[3:]) * per_row)
    raw.seek(position)
    return max(1, min(_TABLE_ROWS, _TABLE_BYTES // largest))


def _zigzag_varint(data: bytes) -> int:
    value = 0
    for i, byte in enumerate(data):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            break
    return (value >> 1) ^ -(value & 1)


def _columns(schema: pa.Schema, file: str, columns: frozenset[str]) -> list[str]:
    names = [name for name in schema.names if name in READ_KEYS or name in columns]
    if not names:
        raise DataError(
            f"no column of the table is one of a preference pair (found: {quote(', '.join(schema.names))})",
            where=file,
            why='a pair needs both completions, in the columns "chosen" and "rejected"',
            fix="name the columns: --column chosen=NAME --column rejected=NAME",
            kind="missing_key",
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(
            f'the column "{twice}" appears twice', where=file, fix="remove one of them", kind="duplicate_key"
        )
    return names


def _values(batch: pa.RecordBatch, i: int, where: str) -> dict[str, object]:
    name = ""
    try:
        values = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            values[name] = _without_nulls(column[i].as_py())
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
            f'"{name}" holds a value that cannot be read ({_reason(error)})',
            where=where,
            why=f"the column's type is {quote(str(batch.schema.field(name).type))}",
            fix="write the file again with this column as text or as numbers, or without it",
            kind="type",
        ) from error


def _without_nulls(value: object) -> object:
    """A table holds every key in every object; one that is null there was not in the object."""
    if isinstance(value, dict):
        return {key: _without_nulls(member) for key, member in value.items() if member is not None}
    return [_without_nulls(member) for member in value] if isinstance(value, list) else value


def _reading_errors() -> tuple[type[BaseException], ...]:
    """What reading may raise; a store's client has errors of its own, with no common base."""
    botocore = sys.modules.get("botocore.exceptions")
    # Names of a table's columns are decoded as they are asked for.
    return (OSError, UnicodeDecodeError, pa.ArrowException, *([botocore.BotoCoreError] if botocore else []))


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return quote(text.splitlines()[0]) if text else type(error).__name__
