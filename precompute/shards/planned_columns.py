"""The weights and margins of a plan's rows: written with it, and compared with what the data gives later."""

from collections.abc import Mapping

from dpo_opt.schemas.errors import DataError, FingerprintError, quoted
from dpo_opt.schemas.locations import AnyPath, sizes
from dpo_opt.schemas.manifest import Plan
from dpo_opt.schemas.sidecars import (
    COLUMNS,
    Column,
    ColumnFiles,
    is_planned_file,
    own_file,
    write_column,
)


def write_columns(
    shards_dir: AnyPath, columns: Mapping[str, Column], plan: Plan, *, before: Plan | None = None
) -> None:
    """Write the files of a plan's columns that are not there.

    Args:
        shards_dir: Folder of reference shards.
        columns: What the data gives, by name: of a plan that names files, what their names are the hashes of.
        plan: It names the files, or is of a folder that began without names.
        before: The plan that it extends, if it does not stand yet. Where files have no hash, the values of
            its rows stay as they are in the folder.

    Raises:
        DataError: A column of the plan before is damaged or is another table.
    """
    there = sizes(shards_dir / COLUMNS)
    for name, column in columns.items():
        file = None if plan.columns is None else plan.columns[name]
        grows = file is None and before is not None
        if grows or (file or own_file(name)).removeprefix(f"{COLUMNS}/") not in there:
            write_column(shards_dir, name, column, file=file, keep_rows=before.rows if before else 0)


def require_columns_of(shards_dir: AnyPath, files: ColumnFiles) -> None:
    """Check that a plan which was made again names the columns that the lost one named.

    Args:
        shards_dir: Folder of reference shards.
        files: What the new plan names.

    Raises:
        DataError: The folder has a planned file of another name.
    """
    there = {f"{COLUMNS}/{name}" for name in sizes(shards_dir / COLUMNS)}
    other = sorted(file for file in there - set((files or {}).values()) if is_planned_file(file))
    if other:
        raise DataError(
            "the plan is lost, and the data gives other weights or margins than it did",
            where=str(shards_dir / other[0]),
            why="pairs would count in another way than they were planned to",
            fix=f"restore the data, or rm {' '.join(quoted(shards_dir / file) for file in other)} "
            "to take what it gives now",
        )


def other_columns(
    shards_dir: AnyPath, planned: ColumnFiles, given: ColumnFiles, *, fix: str | None = None
) -> FingerprintError:
    """The error of a run whose data gives the rows of a folder other weights or margins.

    Args:
        shards_dir: The folder.
        planned: What its plan names, or the one that another run has claimed.
        given: What the plan of the run names for the same rows.
        fix: Where it is not to pass others.
    """
    planned, given = planned or {}, given or {}
    names = [name for name in sorted(planned.keys() | given.keys()) if planned.get(name) != given.get(name)]
    if fix is None:
        own = quoted(shards_dir / own_file(names[0]))
        fix = (
            f"run with the data as it was planned, and write other numbers to {own} (columns row and "
            f"{names[0]}), which counts instead; or pass another --shards folder"
        )
    return FingerprintError(
        f"the folder was planned with another {' and another '.join(names)} of its rows than the data gives",
        where=str(shards_dir),
        why="some of its rows would count as one data set says, and some as the other does",
        fix=fix,
    )
