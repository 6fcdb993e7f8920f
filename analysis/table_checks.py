"""Checks that a Parquet file is the table that it should be, before anything is computed with it."""

from collections.abc import Collection
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_opt.analysis.run_files import Run
from dpo_opt.schemas.arrow_file import arrow_file
from dpo_opt.schemas.errors import DataError, first_line, quoted
from dpo_opt.schemas.run_layout import KL, PAIR_LOGPS, SCORES

UNREADABLE = (
    pl.exceptions.ComputeError,
    pl.exceptions.SchemaError,
    pl.exceptions.InvalidOperationError,
)
"""What a query raises where a table's pages are damaged, or a column holds another type."""


def set_aside(file: Path, *, called: str) -> str:
    """The command that lets nobody take a file for one of a run's any more; it is called so then."""
    return f"mv {quoted(file)} {quoted(f'{file}.{called}')}"


def without(file: Path, *, called: str) -> str:
    """The fix for a file of which a run needs no other: the command goes on as if it was not there."""
    return f"{set_aside(file, called=called)}, then run the same command without it"


def require_table(file: Path, schema: pa.Schema, *, what: str, later: Collection[str] = ()) -> None:
    """Refuse a file that is damaged, or another program's.

    Args:
        file: The Parquet file.
        schema: The columns that it needs. Where one is not nullable, every row has a value.
        what: What the table is of, in words.
        later: Columns that tables of earlier versions lack.

    Raises:
        DataError: It is no Parquet, or a column is missing, holds another type or has rows without a value.
    """
    if file.is_symlink() and not file.exists():
        raise DataError(
            "it is a link to a file that is not there",
            where=str(file),
            why=f"a table of {what} was there",
            fix=f"rm {quoted(file)}, then run the same command without it; or put "
            f"{quoted(file.readlink())} back",
        )
    try:
        with arrow_file(file) as raw, pq.ParquetFile(raw) as table:
            there, empty = table.schema_arrow, _columns_with_nulls(table, schema)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"not readable as Parquet ({first_line(error)})",
            where=str(file),
            why="the file is truncated, damaged or not Parquet",
            fix=without(file, called="damaged"),
        ) from error
    # A file of another program, that stands among ours or in the place of one.
    apart = f"{without(file, called='other')}; or write it again with the command that made it"
    missing = [name for name in schema.names if name not in there.names and name not in later]
    if missing:
        raise DataError(
            f"this is not a table of {what}: it lacks the columns {', '.join(missing)}",
            where=str(file),
            why="its rows cannot be compared with the reference without them",
            fix=apart,
        )
    if others := _columns_of_other_types(there, schema):
        raise DataError(
            f"this is not a table of {what}: {'; '.join(others)}",
            where=str(file),
            why="what is computed with these columns would fail, or mean something else",
            fix=apart,
        )
    if empty:
        raise DataError(
            f"rows have no value in the columns {', '.join(empty)}",
            where=str(file),
            why=f"every row of a table of {what} has one, so another program changed the file",
            fix=apart,
        )


def unreadable_of(run: Run, error: Exception) -> DataError:
    """What to say where a query failed though all footers were readable: the file whose pages are not.

    Args:
        run: The run whose tables were read.
        error: One of ``UNREADABLE``.
    """
    what = f"a table cannot be read ({first_line(error)})"
    why = "its pages are damaged, or hold other values than they say"
    for file in (file for folder in (PAIR_LOGPS, SCORES, KL) for file in run.tables(folder)):
        try:
            with arrow_file(file) as raw, pq.ParquetFile(raw) as table:
                for _ in table.iter_batches():
                    pass
        except (pa.ArrowException, OSError):
            return DataError(what, where=str(file), why=why, fix=without(file, called="damaged"))
    return DataError(what, where=str(run.path), why=why, fix=f"dpo-opt verify --shards {quoted(run.shards)}")


def _columns_of_other_types(there: pa.Schema, schema: pa.Schema) -> list[str]:
    """Columns that hold something else than they have to, in words. Programs write a type in several ways."""
    known = [name for name in schema.names if name in there.names]
    found, right = (
        pl.DataFrame(pl.from_arrow(pa.schema([of.field(name) for name in known]).empty_table())).schema
        for of in (there, schema)
    )
    return [
        f"{name} holds {found[name]}, not {right[name]}"
        for name in known
        # Where no row has a value, some programs write no type either.
        if found[name] != right[name] and not (schema.field(name).nullable and found[name] == pl.Null)
    ]


def _columns_with_nulls(table: pq.ParquetFile, schema: pa.Schema) -> list[str]:
    """Of the columns that need a value in every row, those that lack some.

    Footers say it of what our own programs write. Of a column of which one does not, the values are read.
    """
    needed = [field.name for field in schema if not field.nullable and field.name in table.schema_arrow.names]
    counts: dict[str, int | None] = dict.fromkeys(needed, 0)
    for group in map(table.metadata.row_group, range(table.metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            # Of a list the footer counts what lies in it, too.
            name = column.path_in_schema
            if (before := counts.get(name)) is not None:
                of_group = column.statistics and column.statistics.has_null_count
                counts[name] = before + column.statistics.null_count if of_group else None
    unsaid = [name for name, count in counts.items() if count is None]
    if unsaid:
        read = table.read(columns=unsaid)
        counts |= {name: read[name].null_count for name in unsaid}
    return [name for name, count in counts.items() if count]
