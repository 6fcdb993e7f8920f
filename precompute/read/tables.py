"""Parquet, read with caps: its footer bounds neither the memory a row takes nor the number of rows."""

from collections.abc import Iterator, Sequence, Set
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_opt.precompute.read.file_kinds import other_kind
from dpo_opt.precompute.read.foreign_forms import refuse_foreign
from dpo_opt.precompute.read.row_blocks import LONGEST_ROW, TableBlock, too_long
from dpo_opt.precompute.read.shapes import has_form, keys_to_read
from dpo_opt.precompute.read.sources import open_file, reading_errors, reason_of
from dpo_opt.precompute.read.strict_json import quote
from dpo_opt.schemas.counts import counted
from dpo_opt.schemas.errors import DataError

# Few rows at a time, and none too large.
ROWS = 256
"""In a block."""
BYTES = 2**27
"""In a block of rows none of which is beyond ``LONGEST_ROW``."""
_BUFFER = 2**21


def table_blocks(
    file: str, columns: frozenset[str], ignored: frozenset[str] = frozenset()
) -> Iterator[TableBlock]:
    """The rows of a Parquet file, in order.

    Args:
        file: A path or URL.
        columns: Columns to load beside those that some form of row reads.
        ignored: Columns not to load.

    Raises:
        DataError: The file cannot be read, or not to its end, or has no column of a pair.
    """
    try:
        # pre_buffer holds a whole row group, which may be the whole file.
        with (
            open_file(file) as raw,
            pq.ParquetFile(
                raw, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True
            ) as table,
        ):
            schema = table.schema_arrow
            given = [name for name in schema.names if name not in ignored]
            names = columns_to_read(given, object_columns(schema), file, columns)
            rows = 0
            for group in range(table.num_row_groups):
                for block in _group_blocks(file, raw, table, group, names):
                    rows += len(block)
                    yield block
            # If the count is damaged, Arrow silently stops early.
            if rows != table.metadata.num_rows:
                raise not_readable(
                    file, "Parquet", f"{rows} of its {counted(table.metadata.num_rows, 'row')} can be read"
                )
    except reading_errors() as error:
        raise not_readable(file, "Parquet", reason_of(error)) from error


def not_readable(file: str, form: str, reason: str) -> DataError:
    """The refusal of a table's file that cannot be read to its end."""
    other = other_kind(file)
    return DataError(
        f"not readable as {form} ({reason})",
        where=file,
        why=f"the file is {other.name}, whatever its name says"
        if other
        else "the file is cut off, damaged or of another format",
        fix=other.fix if other else "copy or download the file again",
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
        if batch.nbytes > max(BYTES, LONGEST_ROW * batch.num_rows):
            raise too_long(f"{prefix}{first}", "row", "check the command that wrote the file")
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
    return max(1, min(ROWS, BYTES // largest))


def _zigzag_varint(data: bytes) -> int:
    value = 0
    for i, byte in enumerate(data):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            break
    return (value >> 1) ^ -(value & 1)


def object_columns(schema: pa.Schema) -> frozenset[str]:
    """The columns that hold objects."""
    return frozenset(field.name for field in schema if pa.types.is_struct(field.type))


def columns_to_read(given: Sequence[str], objects: Set[str], file: str, columns: frozenset[str]) -> list[str]:
    """Which columns of a table are read, in its order.

    Args:
        given: Its columns.
        objects: Those of them that hold objects.
        file: Its name, for messages.
        columns: Columns to read beside those that some form of row reads.

    Raises:
        DataError: None is one of a pair, they are those of a form that is no pairs, or one that is read is
            there twice.
    """
    if not columns and not has_form(set(given)):
        refuse_foreign(set(given), file)
    wanted = columns | keys_to_read(set(given) - columns, objects)
    names = [name for name in given if name in wanted]
    if not names:
        raise DataError(
            f"no column of the table is one of a preference pair (found: {quote(', '.join(given))})",
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
