"""Numbers of a pair that may change without scoring again: one Parquet file per column, by row.

They are stored next to the shards, not in them, and no hash covers them, so a person may replace a weight.
"""

import hashlib
from array import array
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpo_opt.schemas.arrow_file import arrow_file
from dpo_opt.schemas.errors import DataError, first_line
from dpo_opt.schemas.locations import AnyPath, is_file, on_this_machine
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


def write_column(shards_dir: AnyPath, name: str, column: Column, *, keep_rows: int = 0) -> None:
    """Publish ``columns/<name>.parquet``.

    Args:
        shards_dir: Folder of reference shards.
        name: Such as ``weight``.
        column: Its values.
        keep_rows: A column that is there keeps its values below this row: a person may have edited them.

    Raises:
        DataError: The column that is there is damaged or is another table.
    """
    path = shards_dir / COLUMNS / f"{name}.parquet"
    table = pa.table({"row": pa.array(column.rows, pa.int64()), name: pa.array(column.values, pa.float64())})
    if keep_rows and is_file(path):
        there = _read_table(path, name)
        there = there.filter(pc.less(there["row"], keep_rows))
        table = pa.concat_tables([there, table.filter(pc.greater_equal(table["row"], keep_rows))])
    with publish(path) as private, arrow_file(private, "wb") as sink:
        pq.write_table(table, sink)


def columns_digest(columns: Mapping[str, Column], *, from_row: int = 0) -> str:
    """SHA-256 of the columns' values from ``from_row`` on. A column without such a row does not count."""
    digest = hashlib.sha256()
    for name, column in sorted(columns.items()):
        rows, values = np.asarray(column.rows, np.int64), np.asarray(column.values, np.float64)
        if (wanted := rows >= from_row).any():
            digest.update(f"{name} {int(wanted.sum())}\n".encode())
            digest.update(rows[wanted].tobytes() + values[wanted].tobytes())
    return digest.hexdigest()


def columns_of_data(shards_dir: AnyPath) -> dict[str, Column]:
    """The folder's columns among those that data may give.

    Raises:
        DataError: A file is damaged or is another table.
    """
    found = {}
    for name in (WEIGHT, MARGIN):
        if is_file(path := shards_dir / COLUMNS / f"{name}.parquet"):
            table = _read_table(path, name)
            found[name] = Column(
                array("q", table["row"].to_numpy().tobytes()), array("d", table[name].to_numpy().tobytes())
            )
    return found


def read_column(
    shards_dir: AnyPath, name: str, *, rows: npt.NDArray[np.int64], default: float
) -> npt.NDArray[np.float64] | None:
    """The column's value at each of ``rows``; None if the folder has no such column.

    Args:
        shards_dir: Folder of reference shards.
        name: Such as ``weight``.
        rows: (n,) row numbers.
        default: For rows that have no value.

    Raises:
        DataError: The file is damaged or is another table, or a row has a value that is no number, or below 0
            where it is a weight.
    """
    path = shards_dir / COLUMNS / f"{name}.parquet"
    if not is_file(path):
        return None
    table = _read_table(path, name)
    if table["row"].null_count:
        raise _no_column(path, name, "a row number is missing")
    known = table["row"].to_numpy()
    values = table[name].to_numpy()
    _require_usable(path, name, known, values)
    found = np.full(len(rows), default)
    if len(known):
        order = np.argsort(known)
        twice = np.flatnonzero(np.diff(known[order]) == 0)
        if len(twice):
            raise _no_column(path, name, f"row {known[order][twice[0]]} appears twice")
        places = np.minimum(np.searchsorted(known[order], rows), len(known) - 1)
        hit = known[order][places] == rows
        if len(rows) and not hit.any():
            raise _no_column(path, name, "none of its rows is one of this folder")
        found[hit] = values[order][places][hit]
    return found


def _require_usable(
    path: AnyPath, name: str, rows: npt.NDArray[np.int64], values: npt.NDArray[np.float64]
) -> None:
    """A missing value is NaN here, as a file's reader gives it."""
    usable = np.isfinite(values)
    if name == WEIGHT:
        usable &= values >= 0
    bad = np.flatnonzero(~usable)
    if not len(bad):
        return
    others = f" ({len(bad)} rows in all)" if len(bad) > 1 else ""
    found = "nothing (null) or NaN" if np.isnan(values[bad[0]]) else str(values[bad[0]])
    least = " from 0 on" if name == WEIGHT else ""
    raise DataError(
        f"row {rows[bad[0]]} has the {name} {found}{others}",
        where=str(path),
        why="below 0 a weight trains towards the rejected completion; what is no number spoils every mean",
        fix=f"write finite numbers{least} there, or remove the rows: pairs without one count as usual",
    )


def _read_table(path: AnyPath, name: str) -> pa.Table:
    schema = pa.schema({"row": pa.int64(), name: pa.float64()})
    try:
        # Opened once: by its name it may be another file between the footer and the pages.
        with on_this_machine(path) as file, file.open("rb") as handle:
            return pq.read_table(handle, columns=["row", name]).select(["row", name]).cast(schema)
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise _no_column(path, name, first_line(error, named=False)) from error


def _no_column(path: AnyPath, name: str, reason: str) -> DataError:
    return DataError(
        f'not a column "{name}" by row ({reason})',
        where=str(path),
        why="pairs would silently count as if the data said nothing about them",
        fix=f"write it again with the columns row (int64) and {name} (float64), or remove it",
    )
