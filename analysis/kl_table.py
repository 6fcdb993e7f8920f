"""``RUN/kl.parquet``: the KL of each measured checkpoint of a run, one row each, for other programs."""

from collections.abc import Iterable
from pathlib import Path

import polars as pl

from dpo_opt.analysis.kl import KLFile, kl_of_run
from dpo_opt.schemas.storage import publish

KL_TABLE = "kl.parquet"


def kl_table(files: Iterable[KLFile]) -> pl.DataFrame:
    """One row per table of samples, in their order.

    Columns: ``file``, ``step``, ``samples``, ``prompts``, ``tokens``, and of each estimate of ``KLEstimate``
    its value under its name and the bounds of its 95% interval as ``NAME_low`` and ``NAME_high``.
    """
    rows = []
    for kl in files:
        row: dict[str, str | int | float | None] = {"file": kl.file, "step": kl.step}
        for name, value in kl.estimate.as_record().items():
            if isinstance(value, dict):
                row |= {name: value["value"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
            elif value is None:
                row |= {name: None, f"{name}_low": None, f"{name}_high": None}
            else:
                row[name] = value
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


def write_kl_table(run: Path) -> None:
    """Write the table of all that is measured in a run, unless it is there as it would be written.

    Raises:
        DataError: See ``kl_of_run``.
    """
    measured = kl_of_run(run)
    table = kl_table(measured)
    if not measured or _is_there(run / KL_TABLE, table):
        return
    with publish(run / KL_TABLE) as private:
        table.write_parquet(private)


def _is_there(file: Path, table: pl.DataFrame) -> bool:
    try:
        there = pl.read_parquet(file, glob=False)
    except (pl.exceptions.PolarsError, OSError):
        return False
    return there.columns == table.columns and there.equals(table)
