"""What a run ended with: its last evaluations, and the last steps that it logged, each with its pairs."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpo_opt.optimize.run_folder import RunFolder
from dpo_opt.schemas.arrow_file import arrow_file
from dpo_opt.schemas.run_layout import PAIR_LOGPS


class LastMetrics(NamedTuple):
    """Means over pairs, in the names of ``metrics.jsonl`` without their prefix."""

    name: str
    pairs: int
    means: dict[str, float]


def last_metrics(run: Path) -> list[LastMetrics]:
    """The evaluations first, as they are what a run is judged by.

    Args:
        run: A run that came to its end.
    """
    training, evaluations = RunFolder(run).history()
    found = []
    for line in evaluations[-1:]:
        for prefix in [key.removesuffix("loss") for key in line if key.endswith("_loss")]:
            name = prefix.removeprefix("eval_").removesuffix("_")
            folder = run / PAIR_LOGPS / name
            pairs = _count(folder, phase="eval", first=int(line["step"]), end=int(line["step"]) + 1)
            found.append(LastMetrics(name or "held out", pairs, _without(prefix, line)))
    for last in training[-1:]:
        before, end = (int(training[-2]["step"]) if len(training) > 1 else 0), int(last["step"])
        pairs = _count(run / PAIR_LOGPS, phase="train", first=before, end=end)
        steps = end - before
        found.append(LastMetrics(f"last {steps} step{'s' if steps > 1 else ''}", pairs, _without("", last)))
    return found


def _without(prefix: str, line: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in line.items() if name.startswith(prefix)}


def _count(folder: Path, *, phase: str, first: int, end: int) -> int:
    """Pairs of a phase in the steps from ``first`` on and before ``end``."""
    pairs = 0
    for path in folder.glob("*.parquet"):
        with arrow_file(path) as raw, pq.ParquetFile(raw) as file:
            rows = file.read(columns=["step", "phase"])
        inside = (pc.field("step") >= first) & (pc.field("step") < end) & (pc.field("phase") == phase)
        pairs += rows.filter(inside).num_rows
    return pairs
