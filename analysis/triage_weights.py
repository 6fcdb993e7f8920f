"""Writes what a triage found as weights beside the shards: reversible, and never over a person's own."""

from array import array
from collections.abc import Sequence

import numpy as np
import polars as pl

from dpo_opt.analysis.triage import Triage
from dpo_opt.schemas.errors import ConfigError, quoted
from dpo_opt.schemas.locations import AnyPath, inside, is_file
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.sidecars import WEIGHT, Column, column_note, own_file, read_column, write_column

_NOTE = "dpo-opt triage"


def write_weights(shards_dir: AnyPath, found: Triage, *, kinds: Sequence[str], weight: float) -> AnyPath:
    """Weight pairs of some kinds down, in ``columns/weight.parquet``; the data's own weights still count.

    Weights that an earlier triage wrote are replaced.

    Args:
        shards_dir: The folder of shards that was looked at.
        found: What was found there.
        kinds: Of ``triage.KINDS``.
        weight: Factor of these pairs' weight, from 0 on.

    Returns:
        The file. Without it the data's own weights count again.

    Raises:
        ConfigError: There is a file of a person's own weights already.
        DataError: The folder is damaged.
    """
    folder = ShardFolder.open(shards_dir)
    file = inside(shards_dir, own_file(WEIGHT))
    if is_file(file) and not (column_note(file) or "").startswith(_NOTE):
        raise ConfigError(
            "there are weights of your own already",
            where=str(file),
            why="they count instead of all others, and would be lost",
            fix=f"mv {quoted(file)} {quoted(file.with_name('weight.mine.parquet'))}",
        )
    rows = found.pairs["row"].to_numpy()
    of_kinds = found.pairs.select(pl.any_horizontal(*kinds).alias("any"))["any"].to_numpy()
    columns = folder.manifest.columns
    # Without a column of the plan, the file that is read is the one that an earlier triage wrote.
    planned = (
        read_column(shards_dir, WEIGHT, files=columns, rows=rows, default=1.0, planned_only=True)
        if WEIGHT in (columns or {})
        else None
    )
    values = np.ones(len(rows)) if planned is None else planned
    values = np.where(of_kinds, weight * values, values)
    column = Column(array("q", rows.tolist()), array("d", values.tolist()))
    write_column(shards_dir, WEIGHT, column, note=f"{_NOTE}: {', '.join(kinds)} x {weight:g}")
    return file
