"""``dpo-opt convert``: writes a dataset as a clean one, split by prompt, with a record of what was removed.

The data is read twice, so that the decision about a pair may depend on every other one, and memory does not
grow with the texts.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from dpo_opt.precompute.check.pair_statistics import (
    Facts,
    Wanted,
    collect,
    opening_hash,
    pair_hashes,
    text_hash,
)
from dpo_opt.precompute.check.repeats import find_repeats, near_repeats
from dpo_opt.precompute.check.written_forms import written_rows
from dpo_opt.precompute.config import ConvertConfig
from dpo_opt.precompute.read.datasets import BadRow, scan_pairs
from dpo_opt.precompute.read.sources import refuse_inside
from dpo_opt.schemas.errors import ConfigError, DataError
from dpo_opt.schemas.pairs import PreferencePair
from dpo_opt.schemas.progress import Progress, Silent
from dpo_opt.schemas.storage import publish_folder

_OTHER_WEIGHT = "duplicate_with_other_weight"


class Converted(NamedTuple):
    """What was written."""

    train: int
    eval: int
    removed: dict[str, int]
    """Reason to pairs, or bad rows."""


def convert(config: ConvertConfig, *, progress: Progress | None = None) -> Converted:
    """Write ``train.jsonl``, ``eval.jsonl``, ``_removed.jsonl`` and ``_convert.json`` into a new folder.

    Of exact (and, on request, near) duplicates the first is kept, and repeats with another weight are counted
    apart; of contradictory pairs none is, because nothing says which label is right; pairs with equal
    completions are removed, and so are those that the format to be written cannot hold. Pairs with the same
    prompt go to the same side.

    Raises:
        ConfigError: The folder exists or stands inside the data, or the sources cannot be what is meant.
        DataError: A file cannot be read, a row is malformed and that is to stop it all, or nothing is left.
        DpoOptError: The disk is full.
    """
    progress = progress or Silent()
    if config.output.exists():
        raise ConfigError(
            "the output exists already",
            where=str(config.output),
            why="files of another conversion would stand among these",
            fix="pass another --output, or remove this one",
        )
    refuse_inside(config, config.output, option="--output")
    facts = collect(
        config, Wanted(near_duplicates=config.near_duplicates), processes=config.processes, progress=progress
    )
    reasons = _reasons(facts, config)
    with publish_folder(config.output) as private:
        converted = _write(config, facts, reasons, private, progress)
        if not converted.train:
            raise DataError(
                f"no pair is left to train on ({converted.eval} held out, {_words(converted.removed)})",
                where=", ".join(config.data),
                fix="leave --eval-split out" if converted.eval else "dpo-opt check DATA",
            )
    return converted


def _reasons(facts: Facts, config: ConvertConfig) -> dict[int, tuple[str, str]]:
    """Pair to why it is removed, and what it was compared with."""
    repeats = find_repeats(facts)
    reasons: dict[int, tuple[str, str]] = {}
    if config.near_duplicates:
        for pair, earlier in near_repeats(facts, similarity=config.similarity).items():
            reasons[pair] = ("near_duplicate", facts.places[earlier])
    for pair in np.flatnonzero(repeats.earlier < np.arange(len(facts))).tolist():
        reasons[pair] = ("duplicate", facts.places[int(repeats.earlier[pair])])
    for pair in np.flatnonzero(repeats.opposite >= 0).tolist():
        reasons[pair] = ("contradictory", facts.places[int(repeats.opposite[pair])])
    for pair in np.flatnonzero(facts.chosen == facts.rejected).tolist():
        reasons[pair] = ("identical_completions", "")
    return reasons


def _write(
    config: ConvertConfig,
    facts: Facts,
    reasons: dict[int, tuple[str, str]],
    folder: Path,
    progress: Progress,
) -> Converted:
    counts: Counter[str] = Counter()
    removed: Counter[str] = Counter()
    unwritable: DataError | None = None
    progress.start("writing", total=len(facts), unit="rows")
    with (
        (folder / "train.jsonl").open("w", encoding="utf-8") as train,
        (folder / "eval.jsonl").open("w", encoding="utf-8") as held_out,
        # The name of a file need not be UTF-8; what cannot be written as it is, JSON escapes in this way.
        (folder / "_removed.jsonl").open("w", encoding="utf-8", errors="backslashreplace") as record,
    ):
        number = itertools.count()
        written = _Written()
        weights = {other: 1.0 for reason, other in reasons.values() if reason == "duplicate"}
        for item in _in_step(config, facts):
            if isinstance(item, BadRow):
                error = item.error
                if config.on_bad_row == "error":
                    raise error
                removed["bad_row"] += 1
                said = {"where": error.where, "reason": "bad_row", "kind": error.kind, "detail": error.what}
                _line(record, said)
                continue
            pair = next(number)
            progress.advance(1)
            if item.where in weights:
                weights[item.where] = _weight(item.weight)
            if pair in reasons:
                reason, other = reasons[pair]
                if reason == "duplicate" and _weight(item.weight) != weights[other]:
                    reason = _OTHER_WEIGHT
                removed[reason] += 1
                detail = {"same_as": other} if other else {}
                _line(record, {"where": item.where, "reason": reason, **detail})
                continue
            try:
                rows = written_rows(item, config.to)
            except DataError as error:
                if config.on_bad_row == "error":
                    raise
                unwritable = unwritable or error
                removed[str(error.kind)] += 1
                _line(record, {"where": item.where, "reason": error.kind, "detail": error.why})
                continue
            to_eval = opening_hash(item.prompt) / 2**64 < config.eval_split
            for row in rows:
                if len(rows) > 1 and (again := written.repeated(row)):
                    removed[again] += 1
                    _line(record, {"where": item.where, "reason": again})
                    continue
                counts["eval" if to_eval else "train"] += 1
                _line(held_out if to_eval else train, row)
    progress.finish()
    if unwritable is not None and not counts:
        raise DataError(
            f"the format {config.to} can hold none of the rows that are left",
            where=unwritable.where,
            why=f"of the first of them: {unwritable.why}",
            fix="pass --to trl, which holds every row",
            kind=unwritable.kind,
        )
    converted = Converted(counts["train"], counts["eval"], dict(sorted(removed.items())))
    about = {
        "dpo_opt": version("dpo-opt"),
        "settings": config.model_dump(mode="json", exclude={"processes"}),
        **converted._asdict(),
    }
    (folder / "_convert.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    if not counts["eval"]:
        (folder / "eval.jsonl").unlink()
    return converted


class _Written:
    """The rows that were written, by 64-bit hash: a completion may stand in several pairs of a prompt."""

    def __init__(self) -> None:
        self._weights: dict[int, float] = {}

    def repeated(self, row: dict[str, Any]) -> str | None:
        """Why the row is removed, as one that was written before; None: it is a new one."""
        told = [row.get(name) for name in ("prompt", "completion", "label", "tools", "chat_template_kwargs")]
        key, weight = text_hash(json.dumps(told)), _weight(row.get("weight"))
        if key not in self._weights:
            self._weights[key] = weight
            return None
        return "duplicate" if self._weights[key] == weight else _OTHER_WEIGHT


def _weight(given: float | None) -> float:
    return 1.0 if given is None else given


def _in_step(config: ConvertConfig, facts: Facts) -> Iterator[PreferencePair | BadRow]:
    """Reads the data a second time, and refuses data that changed since the first."""
    pairs = 0
    for item in scan_pairs(config):
        if isinstance(item, PreferencePair):
            if pairs == len(facts) or facts.hashes(pairs) != pair_hashes(item):
                raise _changed(config)
            pairs += 1
        yield item
    if pairs != len(facts):
        raise _changed(config)


def _changed(config: ConvertConfig) -> DataError:
    return DataError(
        "the data changed while it was read",
        where=", ".join(config.data),
        why="what is removed was decided about other pairs",
        fix="run the same command again when nobody writes to it",
    )


def _line(file: TextIO, row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _words(removed: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in removed.items()) or "none removed"
