"""The weights and margins of a plan's rows: written with it, and compared with what the data gives later."""

from collections.abc import Mapping

from dpo_opt.schemas.errors import FingerprintError, quoted
from dpo_opt.schemas.locations import AnyPath, is_file, sizes
from dpo_opt.schemas.manifest import Plan
from dpo_opt.schemas.sidecars import COLUMNS, Column, column_path, planned_file, whole_column, write_column


def write_columns(
    shards_dir: AnyPath, columns: Mapping[str, Column], plan: Plan, *, before: Plan | None
) -> None:
    """Write the columns of a plan that does not stand yet, over what a killed run left for one like it.

    Args:
        shards_dir: Folder of reference shards.
        columns: What the data gives, by name.
        plan: It names the files.
        before: The plan that it extends. The values of its rows stay as they are in the folder.

    Raises:
        DataError: A column of the plan before is damaged or is another table.
    """
    earlier = None if before is None else before.columns
    there = sizes(shards_dir / COLUMNS)
    for name, column in columns.items():
        path = column_path(shards_dir, name, plan.columns)
        # Readers follow the plan before, and may follow the same file of it.
        if path == column_path(shards_dir, name, earlier) and path.name in there:
            continue
        keep_rows = 0 if before is None else before.rows
        write_column(shards_dir, name, column, files=plan.columns, before=earlier, keep_rows=keep_rows)


def write_lost_columns(shards_dir: AnyPath, columns: Mapping[str, Column], plan: Plan) -> None:
    """Make columns again that were removed. Others stay, because a person may have edited them.

    Args:
        shards_dir: Folder of reference shards.
        columns: What the data gives, by name.
        plan: Of the folder.
    """
    there = sizes(shards_dir / COLUMNS)
    for name, column in columns.items():
        is_planned = plan.columns is None or name in plan.columns
        if is_planned and column_path(shards_dir, name, plan.columns).name not in there:
            write_column(shards_dir, name, column, files=plan.columns)


def differing_columns(shards_dir: AnyPath, plan: Plan, new: Plan) -> list[str]:
    """The columns that a folder does not have as the data gives them, by name.

    A column that was removed may become what the data gives now. A plan from before it named its columns says
    nothing of them, so what is there may be a person's.

    Args:
        shards_dir: The folder.
        plan: Its plan.
        new: The same plan, with the columns of the data.

    Raises:
        DataError: A column that the plan does not have is there, and is damaged or another table.
    """
    if plan.columns is None:
        return []
    own = new.columns or {}
    return [
        name
        for name in sorted(plan.columns.keys() | own.keys())
        if plan.columns.get(name) != own.get(name) and not _is_there(shards_dir, name, plan, own.get(name))
    ]


def _is_there(shards_dir: AnyPath, name: str, plan: Plan, file: str | None) -> bool:
    path = column_path(shards_dir, name, plan.columns)
    if not is_file(path):
        return plan.columns is not None and name in plan.columns
    return planned_file(name, whole_column(path, name)) == file


def other_columns(shards_dir: AnyPath, plan: Plan, new: Plan, *, fix: str | None = None) -> FingerprintError:
    """The error of a run whose data gives the rows of a folder other weights or margins.

    Args:
        shards_dir: The folder.
        plan: Its plan, or the one that another run has claimed.
        new: The same plan, with the columns of the data.
        fix: Where it is not to take those of the data.
    """
    planned, own = plan.columns or {}, new.columns or {}
    names = [name for name in sorted(planned.keys() | own.keys()) if planned.get(name) != own.get(name)]
    if fix is None:
        files = [column_path(shards_dir, name, planned) for name in names]
        there = " ".join(quoted(path) for path in files if is_file(path))
        fix = (
            f"rm {there}, then run the same command again: it takes what the data gives, and scores nothing"
            if there
            else f"write them to {quoted(files[0])} (columns row and {names[0]}), then run the same command "
            "again; or pass another --shards folder"
        )
    return FingerprintError(
        f"the folder was planned with another {' and another '.join(names)} of its rows than the data gives",
        where=str(shards_dir),
        why="some of its rows would count as one data set says, and some as the other does",
        fix=fix,
    )
