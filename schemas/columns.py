"""Numbers of a pair that may change without scoring again: one Parquet file per column, by row.

They stand beside the shards, not in them, and no hash names them: replacing a weight is not another dataset.
"""

from array import array
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.locations import AnyPath, explained, on_this_machine
from dpo_opt.schemas.storage import publish

COLUMNS = "columns"
"""Folder of the sidecars, inside a folder of shards."""
WEIGHT = "weight"
MARGIN = "margin"


class Column(NamedTuple):
    """Rows that have a value, in order, and their values: 16 bytes per row."""

    rows: "array[int]"
    values: "array[float]"


def new_column() -> Column:
    """A column without a value yet."""
    return Column(array("q"), array("d"))


def write_column(shards_dir: AnyPath, name: str, column: Column) -> None:
    """Publish ``columns/<name>.parquet``."""
    table = pa.table({"row": pa.array(column.rows, pa.int64()), name: pa.array(column.values, pa.float64())})
    with publish(shards_dir / COLUMNS / f"{name}.parquet") as private:
        pq.write_table(table, private)


def read_column(
    shards_dir: AnyPath, name: str, *, rows: npt.NDArray[np.int64], default: float
) -> npt.NDArray[np.float64] | None:
    """The column's value at each of ``rows``, or None where the folder has no such column.

    Args:
        shards_dir: Folder of reference shards.
        name: Such as ``weight``.
        rows: (n,) row numbers.
        default: For rows that have no value.

    Raises:
        DataError: The file is damaged or is another table.
    """
    path = shards_dir / COLUMNS / f"{name}.parquet"
    with explained(path):
        if not path.is_file():
            return None
    try:
        with on_this_machine(path) as file:
            table = pq.read_table(file, columns=["row", name])
        known = table["row"].to_numpy()
        values = table[name].to_numpy().astype(np.float64)
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise DataError(
            f'not a column "{name}" by row ({str(error).splitlines()[0]})',
            where=str(path),
            why="pairs would silently count as if the data said nothing about them",
            fix="write it again with the columns row (int64) and " + name + " (float64), or remove it",
        ) from error
    found = np.full(len(rows), default)
    if len(known):
        order = np.argsort(known)
        places = np.minimum(np.searchsorted(known[order], rows), len(known) - 1)
        hit = known[order][places] == rows
        found[hit] = values[order][places][hit]
    return found
