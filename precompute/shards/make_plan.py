"""Makes the plan of a folder: what it will hold, fixed before anything is scored.

Planning reads every row once, so a malformed row is found before any GPU time is spent. Nothing is written
until at least one pair is known to survive tokenization.

Planning also looks for rows that the tokenizer refuses. To make every row's ids takes many times as long as
to read it. So that is done only if the tokenizer has ids beyond the model's vocabulary, and in a dry run. To
render every row of messages takes two to three times as long as to read it. So one row of each shape is
rendered, because a chat template refuses a row for its shape: who speaks in which order, with which keys.
"""

import bisect
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.read.datasets import (
    BadFile,
    BadRow,
    Reading,
    scan_blocks,
)
from dpo_opt.precompute.read.parallel import map_in_order
from dpo_opt.precompute.read.row_blocks import Block
from dpo_opt.precompute.shards.first_usable import first_usable
from dpo_opt.precompute.shards.planned_rows import Encoded, RowFacts, RowsDigest, Shape, read_block
from dpo_opt.precompute.shards.read_plan import known_plans
from dpo_opt.precompute.shards.reference import Reference, fingerprint_of, on_the_day_of
from dpo_opt.precompute.shards.refused_plan import is_refused
from dpo_opt.precompute.tokens.tokenize import PairTokenizer
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.manifest import (
    Plan,
    ShardRange,
)
from dpo_opt.schemas.pairs import Numerics
from dpo_opt.schemas.shards import UNPAIRED
from dpo_opt.schemas.sidecars import Column, ColumnFile, new_column, planned_file


class Planned(NamedTuple):
    """A plan, and what the data says about its rows apart from their texts."""

    plan: Plan
    known_digest: str | None
    """Digest of the rows that the folder's own plan counts; None if the data has no more rows."""
    columns: dict[str, Column]
    """``weight`` and ``margin``, if some row has one or the folder's own plan names such a column."""
    known_columns: dict[str, ColumnFile] | None
    """What the folder's own plan would name for its rows by this data; None if it names no columns."""
    bad_rows: list[BadRow]
    """Rows that are left out; empty unless ``on_bad_row`` is ``skip``. At most ``_BAD_ROWS_SHOWN``."""
    earlier: Sequence[Plan] = ()
    """The folder's plans when this one was made."""
    model: Path | None = None
    """Folder of the reference, whose configuration is stored next to the plan."""
    bad_row_count: int = 0
    """How many rows are left out."""


_BAD_ROWS_SHOWN = 5


def make_plan(
    config: PrecomputeConfig,
    *,
    reference: Reference,
    tokenizer: PairTokenizer,
    numerics: Numerics,
    tokenize_all: bool = False,
) -> Planned:
    """Count and digest the rows, and divide them into shards.

    The rows that were added to a folder begin a new shard. A chat template is told the date of the folder's
    first plan, unless the configuration gives one. A plan whose run was refused is no plan to follow.

    Args:
        config: Of the run.
        reference: The model that scores.
        tokenizer: Its tokenizer.
        numerics: Of the scorer.
        tokenize_all: Make every row's ids, whatever time it takes.

    Raises:
        ConfigError: A row holds messages and the tokenizer has no chat template.
        DataError: A row is malformed or refused by the tokenizer, or no pair survives tokenization.
    """
    earlier = known_plans(config.shards)
    planned = _plan_after(earlier, config, reference, tokenizer, numerics, tokenize_all=tokenize_all)
    if earlier and planned.plan != earlier[-1] and is_refused(config.shards, earlier):
        return _plan_after([], config, reference, tokenizer, numerics, tokenize_all=tokenize_all)
    return planned


def _plan_after(
    earlier: Sequence[Plan],
    config: PrecomputeConfig,
    reference: Reference,
    tokenizer: PairTokenizer,
    numerics: Numerics,
    *,
    tokenize_all: bool,
) -> Planned:
    """A plan that follows a folder's earlier ones."""
    if earlier:
        tokenizer = on_the_day_of(earlier[-1], config, tokenizer)
    unpaired = first_usable(config, reference, tokenizer).label is not None
    division = _Division(config.pairs_per_shard, earlier)
    # Plans of early versions named no columns: a folder goes on as it began.
    unnamed = bool(earlier) and earlier[-1].columns is None
    named = (earlier[-1].columns or {}) if earlier else {}
    columns = {name: new_column() for name in named}
    bad_rows: list[BadRow] = []
    shapes: set[Shape] = set()
    weighted = not_weighted = bad = 0
    for row in _facts_of_rows(config, reference, tokenizer, tokenize_all=tokenize_all):
        error = row.error
        if row.example is not None and row.example.shape not in shapes:
            shapes.add(row.example.shape)
            texts = tokenizer.texts(row.example.pair)
            error = texts if isinstance(texts, DataError) else None
        if error is not None:
            if config.on_bad_row == "error":
                raise error
            bad += 1
            if len(bad_rows) < _BAD_ROWS_SHOWN:
                bad_rows.append(BadRow(division.rows, error, b""))
        elif row.used:
            if row.unpaired != unpaired:
                raise _two_kinds(config)
            zero = row.numbers.get("weight") == 0
            weighted, not_weighted = weighted + (not zero), not_weighted + zero
        for name, value in row.numbers.items():
            column = columns.setdefault(name, new_column())
            column.rows.append(division.rows)
            column.values.append(value)
        division.add(row)
    if not_weighted and not weighted and not earlier:
        raise DataError(
            f"the weights of all {'rows' if unpaired else 'pairs'} are 0",
            where=", ".join(config.data),
            why="none of them would count in the loss, and `train` would refuse the folder",
            fix="correct the column weight, or pass --ignore-column weight to leave it out",
        )
    by_message = division.counts_bad_rows_by_message()
    plan = Plan(
        fingerprint=fingerprint_of(
            config, reference, tokenizer, numerics, rows=UNPAIRED if unpaired else None
        ),
        dataset_digest=division.digest.hexdigest(by_message=by_message),
        rows=division.rows,
        pairs_per_shard=config.pairs_per_shard,
        columns=None if unnamed else {name: planned_file(name, *column) for name, column in columns.items()},
        shards=division.shards(by_message=by_message),
    )
    known = division.known
    known_digest = None if known is None else known.hexdigest(by_message=by_message)
    return Planned(
        plan,
        known_digest,
        columns,
        _known_columns(columns, earlier),
        bad_rows,
        earlier,
        reference.folder,
        bad,
    )


def _known_columns(columns: Mapping[str, Column], earlier: Sequence[Plan]) -> dict[str, ColumnFile] | None:
    """The files that the last plan would name, if the data gave its rows these values."""
    if not earlier or earlier[-1].columns is None:
        return None
    known = {}
    for name, column in columns.items():
        # Rows ascend, because they are read in order.
        count = bisect.bisect_left(column.rows, earlier[-1].rows)
        if count or name in earlier[-1].columns:
            known[name] = planned_file(name, column.rows[:count], column.values[:count])
    return known


def _facts_of_rows(
    config: PrecomputeConfig, reference: Reference, tokenizer: PairTokenizer, *, tokenize_all: bool
) -> Iterator[RowFacts]:
    """What a plan keeps of each row, in order, read by several processes."""
    encoded = (
        Encoded(reference.folder, tokenizer.template_date, config.train_on)
        if tokenize_all or not tokenizer.knows_every_id()
        else None
    )
    token = os.urandom(16)
    tasks = ((*task, encoded, token) for task in _good_blocks(config))
    preload = () if encoded is None else ("transformers.models.auto.tokenization_auto",)
    for block in map_in_order(read_block, tasks, processes=config.processes, preload=preload):
        yield from block


class _Division:
    """Divides rows into shards as they are read, and notes where the folder's own plan ends."""

    def __init__(self, size: int, earlier: Sequence[Plan]) -> None:
        self.rows = 0
        self.digest = RowsDigest()
        self.known: RowsDigest | None = None
        """Digest of the rows that the folder's last plan counts; None if the data has no more rows."""
        self._size = size
        self._last = earlier[-1] if earlier else None
        self._starts = {plan.rows for plan in earlier}
        self._starts |= {stop for plan in earlier for stop in _given_ends(plan, size)}
        self._parts: list[_Part] = []

    def add(self, row: RowFacts) -> None:
        """Count the next row."""
        begins = self.rows in self._starts
        if begins:
            is_known = self._last is not None and self.rows == self._last.rows
            self.known = self.digest.copy() if is_known else None
        if not self._parts or begins or (row.used and self._parts[-1].used == self._size):
            self._parts.append(_Part(self.rows))
        self._parts[-1].digest.add_digests(row.digest, row.message_digest)
        self._parts[-1].used += row.used
        self.digest.add_digests(row.digest, row.message_digest)
        self.rows += 1

    def counts_bad_rows_by_message(self) -> bool:
        """Whether the folder was planned by a version that took the digest of a bad row's message."""
        if self._last is None:
            return False
        of_known, digest = self.known or self.digest, self._last.dataset_digest
        return of_known.hexdigest() != digest and of_known.hexdigest(by_message=True) == digest

    def shards(self, *, by_message: bool) -> list[ShardRange]:
        """The shards of all rows so far."""
        stops = [*(part.start for part in self._parts[1:]), self.rows]
        return [
            ShardRange(
                shard=i,
                start=part.start,
                stop=stop,
                not_in_share=stop - part.start - part.used,
                rows_digest=part.digest.hexdigest(by_message=by_message),
            )
            for i, (part, stop) in enumerate(zip(self._parts, stops, strict=True))
        ]


class _Part:
    """A shard in the making: where it begins, how many of its rows are used, and their digest."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.used = 0
        self.digest = RowsDigest()


def _given_ends(plan: Plan, size: int) -> list[int]:
    """Where shards of a known plan end, however the rows are divided now.

    A shard that is not full was the last one of a plan. That plan may be lost, because a manifest covers only
    one plan. A full shard of another size does not count: it ends where the rows are cut now.
    """
    full = plan.pairs_per_shard or max(shard.used for shard in plan.shards)
    return [shard.stop for shard in plan.shards if full == size or shard.used < full]


def _good_blocks(config: PrecomputeConfig) -> Iterator[tuple[Block, Reading]]:
    for item in scan_blocks(config):
        if isinstance(item, BadFile):
            raise item.error
        yield item


def _two_kinds(config: PrecomputeConfig) -> DataError:
    return DataError(
        "the data has pairs, and rows of one completion and a label",
        where=", ".join(config.data),
        why="no loss is of both, so one folder cannot hold them",
        fix="score each kind into a --shards folder of its own",
    )
