"""Preference data, read strictly and as a stream: JSON Lines (plain, gzip, Zstandard) and Parquet.

Memory stays flat whatever the file's size, and every message names the physical line, or the row group and
the row in it (both from 0). ``rows`` says what a row must be; this module says where rows come from.
"""

import codecs
import functools
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_opt.precompute.rows import COLUMNS, Form, parse_object, quote, to_pair, to_prompt
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import PreferencePair, Text

LONGEST_LINE = 64 * 2**20
"""Bytes; a longer line is refused before it is in memory whole."""

_COMPRESSION = {".jsonl": None, ".jsonl.gz": "gzip", ".jsonl.zst": "zstd"}
_PARQUET = ".parquet"
_BUFFER = 2**18
# A Parquet footer does not bound what a row takes in memory (dictionary pages), so few rows at a time.
_PARQUET_ROWS = 64

_SourceRow = tuple[int, str, Callable[[], dict[str, object]]]
"""A row's index, its name for messages, and what reads it, so that skipped rows cost nothing."""


def read_pairs(path: Path, *, start: int = 0, stop: int | None = None) -> Iterator[PreferencePair]:
    """The pairs of a file, in order.

    Args:
        path: ``.jsonl``, ``.jsonl.gz``, ``.jsonl.zst`` or ``.parquet``.
        start: First row to read. Rows before it are counted, not checked; blank lines are no rows.
        stop: Row to stop before; the file's end by default.

    Raises:
        DataError: A row or the file cannot be used; the message names the line and the way out.
    """
    for item in scan_pairs(path, start=start, stop=stop):
        if isinstance(item, DataError):
            raise item
        yield item


def scan_pairs(
    path: Path, *, start: int = 0, stop: int | None = None
) -> Iterator[PreferencePair | DataError]:
    """Like ``read_pairs``, but a bad row is yielded as its error and reading goes on.

    Raises:
        DataError: The file itself cannot be read, or not to its end.
    """
    first: tuple[Form, str] | None = None
    for row, where, load in _source_rows(path, start):
        if stop is not None and row >= stop:
            return
        item: PreferencePair | DataError
        try:
            item, form = to_pair(load(), row=row, where=where)
            first = first or (form, where)
            _refuse_other_form(form, where, first)
        except DataError as error:
            item = error
        yield item


def read_prompts(path: Path) -> Iterator[tuple[Text, str]]:
    """The ``prompt`` of each row of a JSON Lines file, with the row's name; other keys are ignored.

    Raises:
        DataError: A row has no usable prompt, or the file cannot be read.
    """
    for _, where, load in _source_rows(path, 0):
        yield to_prompt(load(), where=where), where


def row_content(pair: PreferencePair) -> bytes:
    """A row's content in one canonical spelling, for the digest of a dataset; its place does not enter."""
    content = {
        "prompt": pair.prompt,
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "source": pair.source,
    }
    return json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def _refuse_other_form(form: Form, where: str, first: tuple[Form, str]) -> None:
    first_form, first_where = first
    if form != first_form:
        raise DataError(
            f"this row holds {form}, but {first_where} holds {first_form}",
            where=where,
            why="the two forms become token ids by different rules",
            fix="split the file by form, or convert one of the forms",
        )


def _source_rows(path: Path, start: int) -> Iterator[_SourceRow]:
    if path.is_dir():
        raise DataError(
            "a folder, not a file", where=str(path), fix=f"name one file, such as {path}/NAME.jsonl"
        )
    if not path.exists():
        raise DataError("there is no such file", where=str(path), fix="check the path given to --data")
    if path.name.endswith(_PARQUET):
        return _parquet_rows(path, start)
    for suffix, compression in _COMPRESSION.items():
        if path.name.endswith(suffix):
            return _json_rows(path, compression, start)
    raise DataError(
        "the file name does not say what the file holds",
        where=str(path),
        why=f"it must end in one of {', '.join([*_COMPRESSION, _PARQUET])}",
        fix="rename the file, or convert it to JSON Lines: one JSON object per line",
    )


def _json_rows(path: Path, compression: str | None, start: int) -> Iterator[_SourceRow]:
    row = number = 0
    try:
        with _open(path, compression) as file:
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                where = f"{path}:{number}"
                if len(line) > LONGEST_LINE:
                    raise DataError(
                        f"the line is longer than {LONGEST_LINE} bytes",
                        where=where,
                        why="no pair is that long; the file may not be JSON Lines",
                        fix="write one JSON object per line",
                    )
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                line = line.rstrip()  # else a text cut off at the line's end reads as a bad newline in it
                if not line:
                    continue
                if row >= start:
                    yield row, where, functools.partial(parse_object, line, where=where)
                row += 1
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"cannot be read after line {number} ({_reason(error)})",
            where=str(path),
            why="the file is cut off, damaged or not readable for this user",
            fix="copy or download the file again",
        ) from error
    if row == 0:
        raise _no_rows(path)


def _open(path: Path, compression: str | None) -> io.BufferedReader:
    if compression is None:
        return path.open("rb")
    # Arrow's stream notices a cut-off end in both formats and reads files of several members.
    return io.BufferedReader(pa.input_stream(str(path), compression=compression), _BUFFER)


def _parquet_rows(path: Path, start: int) -> Iterator[_SourceRow]:
    try:
        # pre_buffer holds a whole row group, which may be the whole file.
        with pq.ParquetFile(
            path, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True
        ) as file:
            if file.metadata.num_rows == 0:
                raise _no_rows(path)
            columns = _columns(file.schema_arrow, path)
            row = 0
            for group in range(file.num_row_groups):
                group_rows = file.metadata.row_group(group).num_rows
                if row + group_rows > start:
                    batches = file.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=columns)
                    yield from _group_rows(path, batches, group=group, first_row=row, start=start)
                row += group_rows
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"not readable as Parquet ({_reason(error)})",
            where=str(path),
            why="the file is cut off, damaged or of another format",
            fix="copy or download the file again",
        ) from error


def _group_rows(
    path: Path, batches: Iterator[pa.RecordBatch], *, group: int, first_row: int, start: int
) -> Iterator[_SourceRow]:
    offset = 0
    for batch in batches:
        for i in range(batch.num_rows):
            if first_row + offset >= start:
                where = f"{path}:row group {group}, row {offset}"
                yield first_row + offset, where, functools.partial(_values, batch, i, where)
            offset += 1


def _values(batch: pa.RecordBatch, i: int, where: str) -> dict[str, object]:
    try:
        return {
            name: column[i].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)
        }
    except UnicodeDecodeError as error:
        raise DataError(
            f"a text that is not valid UTF-8 at its byte {error.start + 1}",
            where=where,
            why="guessing another encoding would change the text",
            fix="write the file again with texts in UTF-8",
        ) from error


def _columns(schema: pa.Schema, path: Path) -> list[str]:
    """The file's columns that are read, after a check that each can hold what it must."""
    for name in ("chosen", "rejected"):
        if name not in schema.names:
            raise DataError(
                f'the column "{name}" is missing (found: {quote(", ".join(schema.names))})',
                where=str(path),
                why='a pair needs both completions, in the columns "chosen" and "rejected"',
                fix="rename the columns",
            )
    present = [name for name in COLUMNS if name in schema.names]
    for name in present:
        if schema.names.count(name) > 1:
            raise DataError(f'the column "{name}" appears twice', where=str(path), fix="remove one of them")
        kind = schema.field(name).type
        if not (_holds_text(kind) or (name != "source" and _holds_messages(kind))):
            expected = "text" if name == "source" else "text or lists of messages (role, content)"
            raise DataError(
                f'the column "{name}" holds {quote(str(kind))}',
                where=str(path),
                why=f"it must hold {expected}",
                fix="write the column again with that type",
            )
    return present


def _holds_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _holds_messages(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not pa.types.is_struct(kind.value_type):
        return False
    fields = {field.name: field.type for field in kind.value_type}
    return all(name in fields and _holds_text(fields[name]) for name in ("role", "content"))


def _no_rows(path: Path) -> DataError:
    return DataError(
        "the file has no rows",
        where=str(path),
        why="there is nothing to score",
        fix="check the command that wrote it",
    )


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return quote(text.splitlines()[0]) if text else type(error).__name__
