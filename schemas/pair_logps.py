"""The table of policy log-probs: what training, evaluation and ``dpo-opt score`` say of each pair.

Everything the analysis shows (rewards, margins, trajectories, hardest pairs) is this table joined with
the reference shards on (row, pair_id).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_opt.schemas.arrow_file import arrow_file
from dpo_opt.schemas.pairs import LogpArray
from dpo_opt.schemas.storage import publish

Phase = Literal["train", "eval", "score"]

PAIR_LOGPS_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("step", pa.int64(), nullable=False),
        pa.field("epoch", pa.float64(), nullable=False),
        pa.field("phase", pa.string(), nullable=False),
        pa.field("checkpoint", pa.string()),
        pa.field("chosen_logps", pa.float64(), nullable=False),
        pa.field("rejected_logps", pa.float64(), nullable=False),
        pa.field("chosen_length", pa.int32(), nullable=False),
        pa.field("rejected_length", pa.int32(), nullable=False),
        pa.field("chosen_token_logps", pa.list_(pa.float32())),
        pa.field("rejected_token_logps", pa.list_(pa.float32())),
    ],
    metadata={"dpo_opt.schema_version": "1"},
)
DTYPE_KEY = "dpo_opt.dtype"
"""Of a table's metadata: what the policy that was scored computed in."""
ROW_GROUP_ROWS = 4096
"""At least, but for the last: a file of ten million rows has a footer of megabytes, and is read by column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLogps:
    """Log-probs of one pair under one state of the policy, in nats."""

    row: int
    pair_id: str
    step: int
    """Optimizer updates made before these values were taken."""
    epoch: float
    phase: Phase
    checkpoint: str | None = None
    chosen_logps: float
    rejected_logps: float
    chosen_length: int
    rejected_length: int
    chosen_token_logps: LogpArray | None = None
    rejected_token_logps: LogpArray | None = None


def write_pair_logps(path: Path, batches: Iterable[Sequence[PairLogps]], *, dtype: str | None = None) -> None:
    """Publish one segment of the table; only one batch and one row group are in memory.

    Args:
        path: The Parquet file.
        batches: Rows of the table.
        dtype: What the policy computed in, kept with the file.
    """
    schema = PAIR_LOGPS_SCHEMA.with_metadata(
        {**PAIR_LOGPS_SCHEMA.metadata, **({DTYPE_KEY: dtype} if dtype else {})}
    )
    with (
        publish(path) as private,
        arrow_file(private, "wb") as sink,
        pq.ParquetWriter(sink, schema, compression="zstd") as writer,
    ):
        held: list[PairLogps] = []
        for rows in batches:
            held += rows
            if len(held) >= ROW_GROUP_ROWS:
                writer.write_table(_table(held, schema))
                held = []
        if held:
            writer.write_table(_table(held, schema))


def _table(rows: Sequence[PairLogps], schema: pa.Schema) -> pa.Table:
    columns = {name: [getattr(row, name) for row in rows] for name in PAIR_LOGPS_SCHEMA.names}
    return pa.Table.from_pydict(columns, schema=schema)


def dtype_of_logps(path: Path) -> str | None:
    """What the policy computed a file of the table in; None if the file does not say."""
    with arrow_file(path) as raw:
        metadata = pq.read_schema(raw).metadata or {}
    found = metadata.get(DTYPE_KEY.encode())
    return found.decode() if found is not None else None
