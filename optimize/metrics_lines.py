"""Reads lines of ``metrics.jsonl``, of which a crash or another program may have changed some."""

import contextlib
from pathlib import Path
from typing import TypeGuard

from dpo_opt.schemas.errors import DataError, quoted
from dpo_opt.schemas.plain_data import json_of

Metrics = dict[str, float | int]


def is_line(entry: object) -> TypeGuard[Metrics]:
    """Whether this is a line of metrics: a mapping of names to numbers, with the step among them."""
    if not isinstance(entry, dict) or not is_whole(entry.get("step")):
        return False
    # JSON has whole numbers of any length.
    return all(isinstance(value, float) or is_whole(value) for value in entry.values())


def is_whole(value: object) -> bool:
    """Whether this is a whole number of 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def lines_until(metrics: Path, count: int, step: int) -> list[str]:
    """The first lines of metrics, at most ``count``, and none of a later step.

    Raises:
        DataError: A line is broken.
    """
    lines = metrics.read_text(encoding="utf-8", errors="replace") if metrics.is_file() else ""
    kept = []
    for number, line in enumerate(lines.splitlines(keepends=True)[:count], start=1):
        try:
            entry = json_of(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or not is_whole(entry.get("step")):
            raise DataError(
                "not a line of metrics",
                where=f"{metrics}:{number}",
                why="the run's end reads every line, and would fail after all steps",
                fix=f"sed -i.bak {number}d {quoted(metrics)}, which leaves out this one, then run the same "
                "command again",
            )
        if entry["step"] <= step:
            kept.append(line)
    return kept


def newest_training_line(metrics: Path) -> Metrics:
    """The last line of a training step that is whole; empty if there is none."""
    lines = metrics.read_text(encoding="utf-8", errors="replace") if metrics.is_file() else ""
    for line in reversed(lines.splitlines()):
        # The last one may still be being written.
        with contextlib.suppress(ValueError):
            if is_line(found := json_of(line)) and "loss" in found:
                return found
    return {}
