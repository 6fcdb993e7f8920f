"""Arrow's own files, as ``datasets`` writes them: a stream of record batches, or a file with their index.

Arrow believes what such a file says of itself, so each batch is checked before a value of it is touched.
"""

from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa

from dpo_opt.precompute.read.row_blocks import LONGEST_ROW, TableBlock, too_long
from dpo_opt.precompute.read.sources import open_file, reading_errors, reason_of
from dpo_opt.precompute.read.tables import BYTES, ROWS, columns_to_read, not_readable, object_columns

_FILE_MAGIC = b"ARROW1"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def arrow_blocks(
    file: str, columns: frozenset[str], ignored: frozenset[str] = frozenset()
) -> Iterator[TableBlock]:
    """The rows of an Arrow file, in order; one record batch is in memory at a time.

    Args:
        file: A path or URL.
        columns: Columns to load beside those that some form of row reads.
        ignored: Columns not to load.

    Raises:
        DataError: The file cannot be read, or not to its end, or has no column of a pair.
    """
    try:
        with open_file(file) as raw:
            for number, batch in enumerate(_batches(file, raw, columns, ignored)):
                batch.validate(full=True)
                yield from _batch_blocks(f"{file}:record batch {number}, row ", file, batch)
    except reading_errors() as error:
        raise not_readable(file, "Arrow", reason_of(error)) from error
    except MemoryError as error:
        raise not_readable(file, "Arrow", "a record batch is larger than the memory") from error


def _batches(
    file: str, raw: BinaryIO, columns: frozenset[str], ignored: frozenset[str]
) -> Iterator[pa.RecordBatch]:
    is_file = raw.read(len(_FILE_MAGIC)) == _FILE_MAGIC
    open_batches = pa.ipc.open_file if is_file else pa.ipc.open_stream
    raw.seek(0)
    schema = open_batches(raw).schema
    given = [name for name in schema.names if name not in ignored]
    names = columns_to_read(given, object_columns(schema), file, columns)
    options = pa.ipc.IpcReadOptions(included_fields=[schema.names.index(name) for name in names])
    raw.seek(0)
    reader = open_batches(raw, options=options)
    if is_file:
        for i in range(reader.num_record_batches):
            yield reader.get_batch(i)
        return
    yield from reader
    # Arrow takes a stream that is cut off between two batches for a whole one, and of two reads the first.
    raw.seek(-len(_END_OF_STREAM), 1)
    if raw.read(len(_END_OF_STREAM)) != _END_OF_STREAM:
        raise not_readable(file, "Arrow", "the mark of its end is missing")
    if raw.read(1):
        raise not_readable(file, "Arrow", "there is something after its end")


def _batch_blocks(prefix: str, file: str, batch: pa.RecordBatch) -> Iterator[TableBlock]:
    for first in range(0, batch.num_rows, ROWS):
        rows = batch.slice(first, ROWS)
        if rows.nbytes > max(BYTES, LONGEST_ROW * rows.num_rows):
            raise too_long(f"{prefix}{first}", "row", "check the command that wrote the file")
        # A slice would take the whole batch with it into another process.
        yield TableBlock(file, prefix, first, rows.take(pa.array(range(rows.num_rows))))
