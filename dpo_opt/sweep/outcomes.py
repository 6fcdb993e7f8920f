"""What the runs of a sweep came to: one row each, and the table ``sweep.parquet``."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_opt.optimize.run_folder import RunFolder
from dpo_opt.schemas.arrow_file import arrow_file
from dpo_opt.schemas.storage import publish
from dpo_opt.sweep.grid import SweepRun, settings_of, varied_settings

TABLE = "sweep.parquet"
# What depends on the machine and its day: a sweep that was killed must end with the same table.
_NOT_OUTCOMES = {"pairs_per_second", "mfu", "learning_rate", "step"}

Row = dict[str, Any]


def outcomes(runs: Sequence[SweepRun]) -> list[Row]:
    """A row for each run.

    Each has ``run`` (its name), ``state`` (``finished``, ``unfinished`` or ``not begun``), the settings that
    differ between the runs, ``steps``, and the metrics of the last evaluation and of the last logged steps,
    under their names in ``metrics.jsonl``. What a run does not have yet is None.
    """
    settings = [settings_of(run.config) for run in runs]
    varied = varied_settings(settings)
    rows: list[Row] = []
    for run, own in zip(runs, settings, strict=True):
        row: Row = {"run": run.name, "state": state_of(run)}
        row |= {name: own[name] for name in varied}
        rows.append(row | _last_metrics(run.config.output_dir))
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]


def state_of(run: SweepRun) -> str:
    """How far a run is: ``finished``, ``unfinished`` or ``not begun``."""
    folder = run.config.output_dir
    if RunFolder(folder).finished_step() is not None:
        return "finished"
    return "unfinished" if folder.is_dir() else "not begun"


def write_table(sweep: Path, rows: Sequence[Row]) -> None:
    """Write ``sweep.parquet``, whole or not at all."""
    columns = {name: _of_one_kind([row[name] for row in rows]) for name in (rows[0] if rows else ())}
    with publish(sweep / TABLE) as private, arrow_file(private, "wb") as sink:
        pq.write_table(pa.Table.from_pydict(columns), sink)


def _of_one_kind(values: Sequence[Any]) -> Sequence[Any]:
    """A column's values; each as text where they are of several kinds, are lists, or have no place in Arrow.

    A setting may be a number in one run and a word in another, and a whole number of any length.
    """
    kinds = {type(value) for value in values if value is not None}
    numbers = kinds <= {int, float} and all(abs(value) < 2**63 for value in values if type(value) is int)
    if numbers or kinds in ({str}, {bool}):
        return values
    return [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]


def best_first(rows: Sequence[Row]) -> Iterator[Row]:
    """Finished runs by their held-out reward accuracy, then the others in their order."""
    finished = [row for row in rows if row["state"] == "finished"]
    yield from sorted(finished, key=lambda row: -(row.get("eval_rewards/accuracies") or 0.0))
    yield from (row for row in rows if row["state"] != "finished")


def _last_metrics(folder: Path) -> Row:
    """The last evaluation's and the last training line's means of a finished run; empty for another."""
    run = RunFolder(folder)
    steps = run.finished_step()
    if steps is None:
        return {}
    found: Row = {"steps": steps}
    training, evaluations = run.history()
    for line in [*evaluations[-1:], *training[-1:]]:
        found |= {name: value for name, value in line.items() if name not in _NOT_OUTCOMES}
    return found
