"""Numbers of a pair that may change without scoring again: one Parquet file per column, by row.

They are stored next to the shards, not in them. A plan names its columns' files, and a file's name holds the
hash of the values that the data gives. So readers notice other values, and what a killed run left for another
plan is never taken for this one's. A person's own numbers are ``columns/<name>.parquet``. They count instead
of the plan's, and no hash is of them; folders of early versions have only such files.
"""

import hashlib
import re
from array import array
from collections.abc import Mapping
from typing import Annotated, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from dpo_opt.schemas.arrow_file import arrow_file
from dpo_opt.schemas.errors import DataError, first_line
from dpo_opt.schemas.locations import AnyPath, inside, is_file, on_this_machine
from dpo_opt.schemas.storage import publish

COLUMNS = "columns"
"""Folder of the sidecars, inside a folder of shards."""
WEIGHT = "weight"
MARGIN = "margin"
CHES = "ches"
CHES_NORMALISED = "ches_normalised"
_NOTE = b"dpo_opt.note"
_PLANNED = rf"{COLUMNS}/[a-z]+-[0-9a-f]{{32}}\.parquet"
ColumnFile = Annotated[str, Field(pattern=f"^{_PLANNED}$")]
"""Name of a column's file as a plan states it, relative to the folder."""
ColumnFiles = Mapping[str, ColumnFile] | None
"""A plan's columns, by name; None in a plan from before it named them."""


class Column(NamedTuple):
    """Rows that have a value, in order, and their values: 16 bytes per row."""

    rows: "array[int]"
    values: "array[float]"


def new_column() -> Column:
    """A column without a value yet."""
    return Column(array("q"), array("d"))


def planned_file(name: str, rows: npt.ArrayLike, values: npt.ArrayLike) -> ColumnFile:
    """The file that a plan names for a column: its name holds 32 hex digits of the SHA-256 of the values.

    Args:
        name: Such as ``weight``.
        rows: (n,) the rows that have a value, in any order.
        values: (n,) their values.
    """
    rows, values = np.asarray(rows, np.int64), np.asarray(values, np.float64)
    order = np.argsort(rows, kind="stable")
    digest = hashlib.sha256(name.encode() + rows[order].tobytes() + values[order].tobytes())
    return f"{COLUMNS}/{name}-{digest.hexdigest()[:32]}.parquet"


def is_planned_file(name: str) -> bool:
    """Whether a plan may name the file as a column's; a person's own files have other names.

    Args:
        name: Relative to the folder of shards.
    """
    return re.fullmatch(_PLANNED, name) is not None


def own_file(name: str) -> str:
    """The file of a person's own numbers, relative to the folder of shards."""
    return f"{COLUMNS}/{name}.parquet"


def column_path(shards_dir: AnyPath, name: str, files: ColumnFiles, *, planned_only: bool = False) -> AnyPath:
    """The file that counts for a column, whether there is such a file or not.

    Args:
        shards_dir: Folder of reference shards.
        name: Such as ``weight``.
        files: As the plan or the manifest names them.
        planned_only: Leave a person's own numbers out where the plan has some.

    Raises:
        DataError: The file is a link that leads out of the folder.
    """
    own = inside(shards_dir, own_file(name))
    planned = (files or {}).get(name)
    if planned is not None and (planned_only or not is_file(own)):
        return inside(shards_dir, planned)
    return own


def write_column(
    shards_dir: AnyPath,
    name: str,
    column: Column,
    *,
    file: ColumnFile | None = None,
    keep_rows: int = 0,
    note: str | None = None,
) -> None:
    """Publish a column.

    Args:
        shards_dir: Folder of reference shards.
        name: Such as ``weight``.
        column: Its values.
        file: That of a plan; without it, a person's own.
        keep_rows: Below this row, the values of a file that is there stay.
        note: What wrote the values and how, kept with them; :func:`column_note` reads it.

    Raises:
        DataError: The file that is there is damaged or is another table.
    """
    path = inside(shards_dir, file or own_file(name))
    table = pa.table({"row": pa.array(column.rows, pa.int64()), name: pa.array(column.values, pa.float64())})
    if keep_rows and is_file(path):
        there = _read_table(path, name)
        there = there.filter(pc.less(there["row"], keep_rows)).replace_schema_metadata(None)
        table = pa.concat_tables([there, table.filter(pc.greater_equal(table["row"], keep_rows))])
    if note is not None:
        table = table.replace_schema_metadata({_NOTE: note})
    with publish(path) as private, arrow_file(private, "wb") as sink:
        pq.write_table(table, sink)


def column_note(path: AnyPath) -> str | None:
    """What wrote a column's file, if it says so.

    Raises:
        DataError: The file is damaged or is another table.
    """
    metadata = _read_table(path, path.stem).schema.metadata or {}
    found = metadata.get(_NOTE)
    return None if found is None else found.decode(errors="replace")


def read_column(
    shards_dir: AnyPath,
    name: str,
    *,
    files: ColumnFiles,
    rows: npt.NDArray[np.int64],
    default: float,
    planned_only: bool = False,
) -> npt.NDArray[np.float64] | None:
    """The column's value at each of ``rows``; None if the folder has no such column.

    Args:
        shards_dir: Folder of reference shards.
        name: Such as ``weight``.
        files: As the manifest names them.
        rows: (n,) row numbers.
        default: For rows that have no value.
        planned_only: Leave a person's own numbers out where the plan has some.

    Raises:
        DataError: The file is damaged or is another table, or a row has a value that is no number, or below 0
            where it is a weight.
    """
    path = column_path(shards_dir, name, files, planned_only=planned_only)
    if not is_file(path):
        return None
    table = _read_table(path, name)
    if table["row"].null_count:
        raise _no_column(path, name, "a row number is missing")
    known = table["row"].to_numpy()
    values = table[name].to_numpy()
    _require_planned_values(path, name, known, values)
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


def has_planned_values(file: str, name: str, rows: npt.ArrayLike, values: npt.ArrayLike) -> bool:
    """Whether a file holds the values that its name is the hash of; a person's own file may hold any.

    Args:
        file: Relative to the folder of shards.
        name: Such as ``weight``.
        rows: (n,) the rows that have a value.
        values: (n,) their values.
    """
    return not is_planned_file(file) or planned_file(name, rows, values) == file


def _require_planned_values(
    path: AnyPath, name: str, rows: npt.NDArray[np.int64], values: npt.NDArray[np.float64]
) -> None:
    if not has_planned_values(f"{COLUMNS}/{path.name}", name, rows, values):
        raise DataError(
            f"its values of {name} are not those of the plan",
            where=str(path),
            why="its name is the hash of what the data gave; other numbers would be taken for those",
            fix=f"put your own numbers into {path.parent / f'{name}.parquet'}, remove this file, and run the "
            "precompute command again: it takes the plan's from the data, and scores nothing",
        )


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
            table = pq.read_table(handle, columns=["row", name]).select(["row", name])
            return table.cast(schema.with_metadata(table.schema.metadata))
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise _no_column(path, name, first_line(error, named=False)) from error


def _no_column(path: AnyPath, name: str, reason: str) -> DataError:
    return DataError(
        f'not a column "{name}" by row ({reason})',
        where=str(path),
        why="pairs would silently count as if the data said nothing about them",
        fix=f"write it again with the columns row (int64) and {name} (float64), or remove it",
    )
