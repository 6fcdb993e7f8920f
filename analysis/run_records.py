"""Reads what a run recorded of itself: ``metrics.jsonl`` and ``parity.json``.

Runs may be unfinished, resumed, or still being written. This file handles that.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import polars as pl

from dpo_opt.schemas.errors import DataError, quoted
from dpo_opt.schemas.plain_data import is_number, json_of
from dpo_opt.schemas.safe_text import printable

_METRICS = "the curves and the last values are drawn from its lines"
_PARITY = "it says which log-ratios are of the size of rounding"


def read_metrics(file: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """What training logged, and what evaluations found: ``Run.train`` and ``Run.evals``.

    Raises:
        DataError: A line is no metrics, or a folder stands there.
    """
    entries = []
    lines = (_text(file, why=_METRICS) or "").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json_of(line)
        except ValueError as error:
            # A last line without a newline is still being written, or a crash cut it off.
            if number == len(lines):
                break
            raise _broken_line("not a JSON object", file, number) from error
        if not isinstance(entry, dict) or not _is_step(entry.get("step")):
            raise _broken_line("an entry without a step", file, number)
        # Values may be infinite or NaN, and whole numbers of any length.
        if any(isinstance(value, int) and abs(value) > sys.float_info.max for value in entry.values()):
            raise _broken_line("a number beyond all that are computed with", file, number)
        if "loss" in entry and not is_number(entry["loss"]):
            raise _broken_line("a loss that is no number", file, number)
        if any("\ud800" <= character <= "\udfff" for name in entry for character in name):
            raise _broken_line("a name that is no text", file, number)
        entries.append(entry)
    evals = [e for e in entries if any(name.startswith("eval_") for name in e)]
    return _metrics_frame([e for e in entries if "loss" in e]), _metrics_frame(evals)


def _is_step(value: object) -> bool:
    return is_number(value) and isinstance(value, int) and 0 <= value < 2**53


def _broken_line(what: str, file: Path, number: int) -> DataError:
    return DataError(
        what,
        where=f"{file}:{number}",
        why=_METRICS,
        fix=f"sed -i.bak {number}d {quoted(file)}, which leaves out this one and keeps the file as it was",
    )


def _metrics_frame(entries: list[dict[str, object]]) -> pl.DataFrame:
    names = dict.fromkeys(k for e in entries for k, v in e.items() if isinstance(v, int | float))
    columns = {n: [v if isinstance(v := e.get(n), int | float) else None for e in entries] for n in names}
    frame = pl.DataFrame(columns, schema_overrides=dict.fromkeys(names, pl.Float64), strict=False)
    if not len(frame):
        return pl.DataFrame(schema={"step": pl.Int64})
    # A resumed run writes the steps since its last checkpoint again; the later values count.
    return frame.cast({"step": pl.Int64}).unique("step", keep="last").sort("step")


def read_parity(file: Path) -> Mapping[str, float] | None:
    """How cached and recomputed log-probs agree: ``Run.parity``; None where it was not measured.

    Raises:
        DataError: It is no JSON object, has a number that none of ours is, or a folder stands there.
    """
    if (text := _text(file, why=_PARITY)) is None:
        return None
    try:
        parity = json_of(text)
    except ValueError as error:
        raise _broken_parity("not a JSON object", file) from error
    if not isinstance(parity, dict):
        raise _broken_parity("not a JSON object", file)
    numbers = {name: value for name, value in parity.items() if isinstance(value, int | float)}
    for name, value in numbers.items():
        # JSON has whole numbers of any length.
        if isinstance(value, int) and abs(value) >= 2**63:
            raise _broken_parity(f"{printable(name):.50} is a number beyond 64 bits", file)
    if not isinstance(parity.get("tokens", 0), int):
        raise _broken_parity("its number of tokens is no whole number", file)
    return numbers


def _broken_parity(what: str, file: Path) -> DataError:
    fix = f"rm {quoted(file)}; nothing is then called rounding"
    return DataError(what, where=str(file), why=_PARITY, fix=fix)


def _text(file: Path, *, why: str) -> str | None:
    """The text of one of the run's files; None where there is none.

    Raises:
        DataError: A folder stands there.
    """
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except IsADirectoryError as error:
        raise DataError(
            "a folder stands where a run has a file",
            where=str(file),
            why=why,
            fix=f"mv {quoted(file)} {quoted(f'{file}.folder')}; without the file the rest is reported",
        ) from error
