"""One row of preference data: written to a file, and read from one."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fakes import write_jsonl

from dpo_opt.precompute.config import DataConfig
from dpo_opt.precompute.read.datasets import BadRow, scan_pairs
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import PreferencePair


def read(path: Path, **options: Any) -> PreferencePair | DataError:
    """The only pair of a file, or why it is none."""
    (found,) = scan_pairs(DataConfig(data=[str(path)], **options))
    return found.error if isinstance(found, BadRow) else found


def written(folder: Path, row: dict[str, Any]) -> list[Path]:
    """The same row in a file of each kind: a table holds only what some form reads."""
    table = folder / "a.parquet"
    pq.write_table(pa.Table.from_pylist([row]), table)
    return [write_jsonl(folder / "a.jsonl", [row]), table]
