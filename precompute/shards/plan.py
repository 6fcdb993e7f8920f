"""What a folder is going to hold, fixed before anything is scored.

Planning reads every row once, so a malformed row is found before any GPU time is spent, and nothing is
written until at least one pair is known to survive tokenization.

Rows that tokenizing refuses are looked for too. Making every row's ids takes many times as long as reading
it, so by default that is done only where it may matter: nowhere if the tokenizer has no id beyond the model's
vocabulary. Of messages one row of each shape is rendered (who speaks in which order, with what beside the
words), because a chat template asks for that before it asks for words. To render every row takes two to three
times as long as to read it. A dry run makes the ids of every row.
"""

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.read.datasets import (
    BadFile,
    BadRow,
    NotInShare,
    Reading,
    Row,
    message_digest,
    parse_block,
    row_digest,
    scan_blocks,
    scan_pairs,
)
from dpo_opt.precompute.read.parallel import map_in_order
from dpo_opt.precompute.read.row_blocks import Block
from dpo_opt.precompute.shards.reference import Reference, fingerprint_of
from dpo_opt.precompute.tokens.tokenize import PairTokenizer, encoder
from dpo_opt.schemas.errors import DataError, quoted
from dpo_opt.schemas.locations import AnyPath, is_file, read_all, sizes
from dpo_opt.schemas.manifest import (
    COMMITS,
    MANIFEST,
    PLAN,
    Manifest,
    Plan,
    ShardRange,
    load_manifest,
    parse,
    repair_command,
)
from dpo_opt.schemas.pairs import Message, Numerics, PreferencePair, TokenizedPair
from dpo_opt.schemas.sidecars import MARGIN, WEIGHT, Column, new_column


class Planned(NamedTuple):
    """A plan, and what the data says about its rows beside their texts."""

    plan: Plan
    known_digest: str | None
    """Digest of the rows that the folder's own plan counts; None where the data has no more than these."""
    columns: dict[str, Column]
    """``weight`` and ``margin``, where some row has one."""
    bad_rows: list[BadRow]
    """Rows that are left out; empty unless ``on_bad_row`` is ``skip``. At most ``_BAD_ROWS_SHOWN``."""
    earlier: Sequence[Plan] = ()
    """The folder's plans when this one was made."""
    model: Path | None = None
    """Folder of the reference, whose configuration is kept beside the plan."""


_BAD_ROWS_SHOWN = 5


def make_plan(
    config: PrecomputeConfig,
    *,
    reference: Reference,
    tokenizer: PairTokenizer,
    numerics: Numerics,
    tokenize_all: bool = False,
) -> Planned:
    """Count and digest the rows, and divide them into shards; where the folder grew, a shard begins anew.

    The date that a chat template is told is the folder's; its first plan fixes it.

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
    known_rows = earlier[-1].rows if earlier else None
    size = config.pairs_per_shard
    grown_at = {plan.rows for plan in earlier} | {
        stop for plan in earlier for stop in _given_ends(plan, size)
    }
    if earlier:
        tokenizer = tokenizer.on(earlier[-1].fingerprint.template_date)
    known: RowsDigest | None = None
    _require_a_usable_pair(config, reference, tokenizer)
    whole = RowsDigest()
    parts: list[_Part] = []
    rows = 0
    columns: dict[str, Column] = {}
    bad_rows: list[BadRow] = []
    shapes: set[Shape] = set()
    encoded = (
        _Encoded(reference.folder, tokenizer.template_date)
        if tokenize_all or not tokenizer.knows_every_id()
        else None
    )
    token = os.urandom(16)
    tasks = ((*task, encoded, token) for task in _good_blocks(config))
    preload = () if encoded is None else ("transformers.models.auto.tokenization_auto",)
    for block in map_in_order(_read_block, tasks, processes=config.processes, preload=preload):
        for found in block:
            error = found.error
            if found.example is not None and found.example.shape not in shapes:
                shapes.add(found.example.shape)
                texts = tokenizer.texts(found.example.pair)
                error = texts if isinstance(texts, DataError) else None
            if error is not None:
                if config.on_bad_row == "error":
                    raise error
                if len(bad_rows) < _BAD_ROWS_SHOWN:
                    bad_rows.append(BadRow(rows, error, b""))
            grown = rows in grown_at
            if grown:
                known = whole.copy() if rows == known_rows else None
            if not parts or grown or (found.used and parts[-1].used == size):
                parts.append(_Part(rows))
            parts[-1].digest.add_digests(found.digest, found.message_digest)
            parts[-1].used += found.used
            for name, value in found.numbers.items():
                column = columns.setdefault(name, new_column())
                column.rows.append(rows)
                column.values.append(value)
            whole.add_digests(found.digest, found.message_digest)
            rows += 1
    # A folder from before bad rows were known by their content goes on as it began.
    of_known = (known or whole) if earlier else None
    by_message = (
        of_known is not None
        and of_known.hexdigest() != earlier[-1].dataset_digest
        and of_known.hexdigest(by_message=True) == earlier[-1].dataset_digest
    )
    plan = Plan(
        fingerprint=fingerprint_of(config, reference, tokenizer, numerics),
        dataset_digest=whole.hexdigest(by_message=by_message),
        rows=rows,
        pairs_per_shard=size,
        shards=[
            ShardRange(
                shard=i,
                start=part.start,
                stop=stop,
                not_in_share=stop - part.start - part.used,
                rows_digest=part.digest.hexdigest(by_message=by_message),
            )
            for i, (part, stop) in enumerate(
                zip(parts, [*(part.start for part in parts[1:]), rows], strict=True)
            )
        ],
    )
    known_digest = None if known is None else known.hexdigest(by_message=by_message)
    return Planned(plan, known_digest, columns, bad_rows, earlier, reference.folder)


class RowsDigest:
    """SHA-256 of the digests of rows, in order; also as it was when a bad row's was that of its message."""

    def __init__(self) -> None:
        self._digest, self._by_message = hashlib.sha256(), hashlib.sha256()

    def add(self, item: Row) -> None:
        self.add_digests(row_digest(item), message_digest(item))

    def add_digests(self, digest: bytes, by_message: bytes) -> None:
        self._digest.update(digest)
        self._by_message.update(by_message)

    def copy(self) -> "RowsDigest":
        """What was added so far."""
        other = RowsDigest()
        other._digest, other._by_message = self._digest.copy(), self._by_message.copy()
        return other

    def hexdigest(self, *, by_message: bool = False) -> str:
        return (self._by_message if by_message else self._digest).hexdigest()

    def is_that_of(self, planned: ShardRange) -> bool:
        """Whether these are the rows that were planned."""
        return planned.rows_digest in (self.hexdigest(), self.hexdigest(by_message=True))


class _Part:
    """A shard in the making: where it begins, how many of its rows are used, and their digest."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.used = 0
        self.digest = RowsDigest()


Shape = tuple[object, ...]
"""What two rows have in common that differ in their words alone."""


class _Example(NamedTuple):
    shape: Shape
    pair: PreferencePair


class _RowFacts(NamedTuple):
    digest: bytes
    message_digest: bytes
    numbers: dict[str, float]
    error: DataError | None
    used: bool = True
    example: _Example | None = None
    """The pair, where it is the first of its shape that this process has read for the plan."""


class _Encoded(NamedTuple):
    """Which ids are made of every row."""

    folder: Path
    template_date: str | None


class _Shown(NamedTuple):
    """The shapes of which this process has sent an example."""

    token: bytes
    """Of the plan that it reads for; blocks of one plan come in order."""
    shapes: set[Shape]


_shown = _Shown(b"", set())


def _shapes_shown(token: bytes) -> set[Shape]:
    global _shown
    if _shown.token != token:
        _shown = _Shown(token, set())
    return _shown.shapes


def _read_block(task: tuple[Block, Reading, _Encoded | None, bytes]) -> list[_RowFacts]:
    block, reading, encoded, token = task
    items = list(parse_block(block, reading))
    refused: dict[int, DataError] = {}
    if encoded is not None:
        pairs = [(i, item) for i, item in enumerate(items) if isinstance(item, PreferencePair)]
        ids = encoder(encoded.folder, encoded.template_date).encode([pair for _, pair in pairs])
        refused = {i: e for (i, _), e in zip(pairs, ids, strict=True) if isinstance(e, DataError)}
    shapes = _shapes_shown(token)
    facts = []
    for i, item in enumerate(items):
        if isinstance(item, BadRow):
            facts.append(_RowFacts(row_digest(item), message_digest(item), {}, item.error))
        elif isinstance(item, NotInShare):
            digest = row_digest(item)
            facts.append(_RowFacts(digest, digest, {}, None, used=False))
        else:
            numbers = {WEIGHT: item.weight, MARGIN: item.margin}
            known = {name: value for name, value in numbers.items() if value is not None}
            digest = row_digest(item)
            example = None
            if encoded is None and (shape := _shape(item)) is not None and shape not in shapes:
                shapes.add(shape)
                example = _Example(shape, item)
            facts.append(_RowFacts(digest, digest, known, refused.get(i), example=example))
    return facts


def _shape(pair: PreferencePair) -> Shape | None:
    """What a chat template may refuse a pair for beside its words; None for text, which it never sees."""
    if isinstance(pair.prompt, str):
        return None
    parts = cast(tuple[list[Message], ...], (pair.prompt, pair.chosen, pair.rejected))
    turns = [tuple([(m["role"], m.get("name"), _form(m)) for m in part]) for part in parts]
    settings = pair.chat_template_kwargs and json.dumps(pair.chat_template_kwargs, sort_keys=True)
    return (*turns, _form(pair.tools), settings)


_KINDS = ("role", "type")  # keys whose text is no words
_FREE = ("arguments", "parameters")  # keys below which each function has keys of its own


def _form(value: object) -> object:
    """A value of JSON without its words: its keys, and how many and which elements its lists have.

    Nor are there the keys of a function's own, or each function would be another shape.
    """
    if isinstance(value, str):
        return bool(value)
    if isinstance(value, dict):
        return tuple([(key, _member_form(key, value[key])) for key in sorted(value)])
    if isinstance(value, list):
        return ("list", *map(_form, value))
    return type(value).__name__


def _member_form(key: str, value: object) -> object:
    if key in _KINDS and isinstance(value, str):
        return value
    if key in _FREE and isinstance(value, dict):
        return ("object", bool(value))
    return _form(value)


def _good_blocks(config: PrecomputeConfig) -> Iterator[tuple[Block, Reading]]:
    for item in scan_blocks(config):
        if isinstance(item, BadFile):
            raise item.error
        yield item


def _require_a_usable_pair(config: PrecomputeConfig, reference: Reference, tokenizer: PairTokenizer) -> None:
    reasons: Counter[str] = Counter()
    for item in scan_pairs(config):
        if isinstance(item, BadRow):
            if config.on_bad_row == "error":
                raise item.error
            reasons["bad_row"] += 1
            continue
        (ids,) = tokenizer.encode([item])
        if isinstance(ids, DataError):
            if config.on_bad_row == "error":
                raise ids
            reasons[f"bad_row:{ids.kind}"] += 1
            continue
        fitted = tokenizer.fit(item, ids)
        if isinstance(fitted, TokenizedPair):
            return
        reasons[fitted.reason] += 1
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    raise DataError(
        f"none of the {reasons.total()} pairs can be used ({counts})",
        where=", ".join(config.data),
        why=f"at --max-length {reference.max_length} nothing would be left to train on",
        fix="pass a larger --max-length, or --truncation keep_end",
    )


def known_plans(shards_dir: AnyPath) -> list[Plan]:
    """The folder's plans; what its manifest covers where there is none, as in a copy for readers.

    Raises:
        DataError: A plan or the manifest is damaged.
    """
    plans = read_plans(shards_dir)
    if plans or not is_file(shards_dir / MANIFEST):
        return plans
    return [plan_of(load_manifest(shards_dir))]


def plan_of(manifest: Manifest) -> Plan:
    """The plan that a manifest covers."""
    return Plan(
        fingerprint=manifest.fingerprint,
        dataset_digest=manifest.dataset_digest,
        rows=manifest.rows,
        pairs_per_shard=manifest.pairs_per_shard,
        shards=ranges_of(manifest),
    )


def _given_ends(plan: Plan, size: int) -> list[int]:
    """Where shards of a known plan end whatever follows; a full one of another size ends where it is cut now.

    One that is not full was the last one of a plan, which may be lost: a manifest covers one plan.
    """
    full = plan.pairs_per_shard or max(shard.used for shard in plan.shards)
    return [shard.stop for shard in plan.shards if full == size or shard.used < full]


def ranges_of(manifest: Manifest) -> list[ShardRange]:
    """The shards that a manifest covers, as a plan states them."""
    return [
        ShardRange.model_validate({name: getattr(c, name) for name in ShardRange.model_fields})
        for c in manifest.shards
    ]


def read_plans(shards_dir: AnyPath) -> list[Plan]:
    """The folder's plans, one for each time it grew; each holds the shards of the one before.

    Raises:
        DataError: One of them is damaged.
    """
    names = sizes(shards_dir)
    wanted = [PLAN, *(f"plan-{i}.json" for i in range(1, len(names)))]
    found = list(itertools.takewhile(lambda name: name in names, wanted))
    texts = read_all(shards_dir, found).items()
    return [
        parse(Plan, text, where=shards_dir / name, fix=repair_command(shards_dir)) for name, text in texts
    ]


def read_plan(shards_dir: AnyPath) -> Plan:
    """The plan that counts now.

    Raises:
        DataError: There is none.
    """
    plans = read_plans(shards_dir)
    if not plans:
        scored = any(name.endswith(".json") for name in sizes(shards_dir / COMMITS))
        raise DataError(
            f"there is no {PLAN}",
            where=str(shards_dir),
            why="what was to be scored is lost" if scored else "this is not a folder of reference shards",
            fix=repair_command(shards_dir)
            if scored
            else f"dpo-opt precompute --model M --data DATA --shards {quoted(shards_dir)}",
        )
    return plans[-1]
