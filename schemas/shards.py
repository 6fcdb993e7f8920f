"""The table of scored pairs: its columns, its writer and its reader.

This is the contract between the precompute and the training environment; FORMAT.md says the same in
words for readers in other languages.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_opt.schemas.arrow_file import arrow_file
from dpo_opt.schemas.arrow_numbers import numbers
from dpo_opt.schemas.errors import DataError, first_line, quoted
from dpo_opt.schemas.fingerprint import Fingerprint
from dpo_opt.schemas.locations import AnyPath
from dpo_opt.schemas.pairs import IdArray, MaskArray, ScoredPair
from dpo_opt.schemas.storage import publish

SCHEMA_VERSION = 1
"""Of folders of pairs."""
UNPAIRED_VERSION = 2
"""Of folders of unpaired rows, so that a reader that knows pairs alone refuses them."""
UNPAIRED = "unpaired"
"""What the fingerprint of such a folder says of its rows."""
ROW_GROUP_ROWS = 128
"""Rows per row group: the unit that training reads and shuffles."""
INDEX_GROUP_ROWS = 65_536
"""The index is read by column: with small groups its footer would take most of the time and memory."""

SHARD_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("source", pa.string()),
        pa.field("id", pa.string()),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("chosen_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("rejected_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("ref_chosen_token_logps", pa.list_(pa.float32()), nullable=False),
        pa.field("ref_rejected_token_logps", pa.list_(pa.float32()), nullable=False),
        pa.field("ref_chosen_logps", pa.float64(), nullable=False),
        pa.field("ref_rejected_logps", pa.float64(), nullable=False),
        pa.field("prompt_length", pa.int32(), nullable=False),
        pa.field("chosen_length", pa.int32(), nullable=False),
        pa.field("rejected_length", pa.int32(), nullable=False),
        pa.field("chosen_truncated", pa.bool_(), nullable=False),
        pa.field("rejected_truncated", pa.bool_(), nullable=False),
        pa.field("chosen_mask", pa.list_(pa.bool_())),
        pa.field("rejected_mask", pa.list_(pa.bool_())),
    ]
)

UNPAIRED_SCHEMA = SHARD_SCHEMA.append(pa.field("label", pa.bool_(), nullable=False))
"""Of shards of unpaired rows."""
_SCHEMAS = {str(SCHEMA_VERSION): SHARD_SCHEMA, str(UNPAIRED_VERSION): UNPAIRED_SCHEMA}

_MASKS = ("chosen_mask", "rejected_mask")
ADDED_COLUMNS = ("id", *_MASKS)
"""Nullable columns that shards from before they were kept lack: null in every row there."""

DROPPED_SCHEMA = pa.schema(
    [
        *map(SHARD_SCHEMA.field, ("row", "source")),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("where", pa.string(), nullable=False),
    ]
)

# What follows from the other columns: stored so that a reader in any language can join and sum at once.
_DERIVED = (
    "pair_id",
    "prompt_id",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "prompt_length",
    "chosen_length",
    "rejected_length",
)

INDEX_SCHEMA = pa.schema(
    [
        *map(SHARD_SCHEMA.field, ("row", "pair_id", "prompt_id")),
        *map(SHARD_SCHEMA.field, ("prompt_length", "chosen_length", "rejected_length")),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("row_group", pa.int32(), nullable=False),
    ]
)


class DroppedRow(NamedTuple):
    """A source row that was left out, and why."""

    row: int
    source: str | None
    reason: str
    where: str


def write_shard(path: AnyPath, pairs: Sequence[ScoredPair], *, fingerprint: Fingerprint, shard: int) -> None:
    """Publish one shard: rows in order, small row groups, page checksums, zstd."""
    version = UNPAIRED_VERSION if fingerprint.rows == UNPAIRED else SCHEMA_VERSION
    table = pa.Table.from_pydict(
        _columns(pairs),
        schema=_SCHEMAS[str(version)].with_metadata(
            {
                "dpo_opt.schema_version": str(version),
                "dpo_opt.fingerprint": fingerprint.model_dump_json(),
                "dpo_opt.shard": str(shard),
            }
        ),
    )
    write_table(path, table)


def _columns(pairs: Sequence[ScoredPair]) -> dict[str, list[object]]:
    return {
        "row": [p.row for p in pairs],
        "pair_id": [p.pair_id for p in pairs],
        "prompt_id": [p.prompt_id for p in pairs],
        "source": [p.source for p in pairs],
        "id": [p.id for p in pairs],
        "prompt_ids": [p.prompt_ids for p in pairs],
        "chosen_ids": [p.chosen_ids for p in pairs],
        "rejected_ids": [p.rejected_ids for p in pairs],
        "ref_chosen_token_logps": [p.ref_chosen_token_logps for p in pairs],
        "ref_rejected_token_logps": [p.ref_rejected_token_logps for p in pairs],
        "ref_chosen_logps": [p.ref_chosen_logps for p in pairs],
        "ref_rejected_logps": [p.ref_rejected_logps for p in pairs],
        "prompt_length": [len(p.prompt_ids) for p in pairs],
        "chosen_length": [len(p.chosen_ids) for p in pairs],
        "rejected_length": [len(p.rejected_ids) for p in pairs],
        "chosen_truncated": [p.chosen_truncated for p in pairs],
        "rejected_truncated": [p.rejected_truncated for p in pairs],
        "chosen_mask": [p.chosen_mask for p in pairs],
        "rejected_mask": [p.rejected_mask for p in pairs],
        "label": [p.label for p in pairs],
    }


def write_dropped(path: AnyPath, dropped: Sequence[DroppedRow]) -> None:
    """Publish the rows that were left out, with the reason for each."""
    columns = list(zip(*dropped, strict=True)) or [()] * len(DROPPED_SCHEMA)
    write_table(path, pa.Table.from_arrays([pa.array(c) for c in columns], schema=DROPPED_SCHEMA))


def write_table(path: AnyPath, table: pa.Table, *, row_group_rows: int = ROW_GROUP_ROWS) -> None:
    """Publish a table the way every file of a shard folder is written."""
    # Hardly two log-probs are alike, so a dictionary is as long as they are; but their first bytes are alike.
    logps = {_leaf(field) for field in table.schema if pa.types.is_floating(_value_type(field))}
    with (
        publish(path) as private,
        arrow_file(private, "wb") as sink,
        pq.ParquetWriter(
            sink,
            table.schema,
            compression="zstd",
            use_dictionary=[leaf for leaf in map(_leaf, table.schema) if leaf not in logps],
            column_encoding=dict.fromkeys(logps, "BYTE_STREAM_SPLIT"),
            write_page_checksum=True,
            write_page_index=True,
        ) as writer,
    ):
        # `datasets` fails on a row group of no rows.
        if len(table):
            writer.write_table(table, row_group_size=row_group_rows)


def _value_type(field: pa.Field) -> pa.DataType:
    return field.type.value_type if pa.types.is_list(field.type) else field.type


def _leaf(field: pa.Field) -> str:
    """What Parquet calls the column of a field's values."""
    return f"{field.name}.list.element" if pa.types.is_list(field.type) else str(field.name)


def read_row_groups(path: Path, *, row_groups: Sequence[int] | None = None) -> Iterator[list[ScoredPair]]:
    """The pairs of a shard, one list per row group.

    Callers that follow a manifest check the file's hash first (``ShardFolder`` does).

    Raises:
        DataError: The file cannot be read as a shard of this version.
    """
    try:
        with arrow_file(path) as raw, pq.ParquetFile(raw, page_checksum_verification=True) as file:
            schema = _schema_of(file, path)
            groups = range(file.num_row_groups) if row_groups is None else row_groups
            for group in groups:
                yield _to_pairs(file.read_row_group(group, columns=_present(file, schema)))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"not readable as a shard ({first_line(error)})",
            where=str(path),
            why="the file is truncated, damaged or not a Parquet file",
            fix=f"dpo-opt verify --shards {quoted(path.parent.parent)}",
        ) from error


def inconsistent_columns(path: Path) -> Iterator[tuple[int, str]]:
    """(row, column) wherever a stored identifier, length or sum does not follow from the ids and log-probs.

    Raises:
        DataError: The file cannot be read as a shard of this version.
    """
    position = 0
    with arrow_file(path) as raw:
        stored = pq.read_table(raw, columns=["row", *_DERIVED])
    for pairs in read_row_groups(path):
        part = stored.slice(position, len(pairs))
        position += len(pairs)
        expected = _columns(pairs)
        for name in _DERIVED:
            for row, found, right in zip(
                part["row"].to_pylist(), part[name].to_pylist(), expected[name], strict=True
            ):
                # Another writer may add in another order.
                if found != right and not (
                    isinstance(right, float) and math.isclose(found, right, rel_tol=1e-6)
                ):
                    yield row, name


def _schema_of(file: pq.ParquetFile, path: Path) -> pa.Schema:
    version = (file.schema_arrow.metadata or {}).get(b"dpo_opt.schema_version", b"none").decode()
    if version not in _SCHEMAS:
        raise DataError(
            f"the shard has schema version {quoted(version)}, this program reads {', '.join(_SCHEMAS)}",
            where=str(path),
            fix="use the version of dpo-opt that wrote it, or run `dpo-opt precompute` again",
        )
    schema = _SCHEMAS[version]
    needed = [name for name in schema.names if name not in ADDED_COLUMNS]
    missing = [name for name in needed if name not in file.schema_arrow.names]
    if missing:
        raise DataError(f"the shard lacks the columns {', '.join(missing)}", where=str(path))
    return schema


def _present(file: pq.ParquetFile, schema: pa.Schema) -> list[str]:
    """The columns of a schema that a file has; it may have others, and lack some that were added later."""
    return [name for name in schema.names if name in file.schema_arrow.names]


def _to_pairs(table: pa.Table) -> list[ScoredPair]:
    ids = {name: _lists(table[name], np.int32) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    logps = {
        name: _lists(table[name], np.float32)
        for name in ("ref_chosen_token_logps", "ref_rejected_token_logps")
    }
    flat = {
        name: table[name].to_pylist()
        for name in ("row", "source", "id", "chosen_truncated", "rejected_truncated", "label")
        if name in table.column_names
    }
    masks = {
        name: [
            _mask(*both, name)
            for both in zip(table[name].to_pylist(), ids[name.replace("mask", "ids")], strict=True)
        ]
        for name in _MASKS
        if name in table.column_names
    }
    columns = {**ids, **logps, **flat, **masks}
    return [ScoredPair(**{name: column[i] for name, column in columns.items()}) for i in range(len(table))]


def _mask(stored: list[bool] | None, ids: IdArray, name: str) -> MaskArray | None:
    if stored is None:
        return None
    mask = np.array(stored, dtype=np.bool_)
    if len(mask) != len(ids) or not mask.any():
        # Every reader of a shard says of this kind of error which file it was reading.
        raise pa.ArrowInvalid(f"a {name} of {len(mask)} tokens, {int(mask.sum())} true, for {len(ids)} ids")
    return mask


def _lists(column: pa.ChunkedArray, dtype: type[np.generic]) -> list[np.ndarray]:
    """A list column as numpy views of its flat values: no Python object per token."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks else pa.array([], type=column.type)
    offsets = numbers(array.offsets)
    values = numbers(array.values).astype(dtype, copy=False)
    return [values[a:b] for a, b in itertools.pairwise(offsets)]
