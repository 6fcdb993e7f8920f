"""What a plan keeps of each row: its digest, its numbers, and whether the tokenizer refuses it."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple, cast

from dpo_opt.precompute.config import TrainOn
from dpo_opt.precompute.read.datasets import (
    BadRow,
    NotInShare,
    Reading,
    Row,
    message_digest,
    parse_block,
    row_digest,
)
from dpo_opt.precompute.read.row_blocks import Block
from dpo_opt.precompute.tokens.tokenize import encoder
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.manifest import ShardRange
from dpo_opt.schemas.pairs import Message, PreferencePair
from dpo_opt.schemas.sidecars import MARGIN, WEIGHT


class RowsDigest:
    """SHA-256 over the digests of rows, in order.

    Early versions took the digest of a bad row's message, not of its content. Their folders still count, so
    both are kept.
    """

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


Shape = tuple[object, ...]
"""Two rows that differ in their words alone have the same shape."""


class _Example(NamedTuple):
    shape: Shape
    pair: PreferencePair


class RowFacts(NamedTuple):
    """What a plan keeps of a row."""

    digest: bytes
    message_digest: bytes
    """The digest that folders of early versions give a bad row; equal to ``digest`` for all other rows."""
    numbers: dict[str, float]
    """Its weight and margin, where the data states them."""
    error: DataError | None
    """Why the row is malformed, or why the tokenizer refuses it."""
    unpaired: bool = False
    """It is one completion with its label, not a pair."""
    used: bool = True
    """False where ``--data-share`` leaves it out."""
    example: _Example | None = None
    """The pair, where it is the first of its shape that this process has read for the plan."""


class Encoded(NamedTuple):
    """The tokenizer that makes every row's ids."""

    folder: Path
    template_date: str | None
    train_on: TrainOn


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


def read_block(task: tuple[Block, Reading, Encoded | None, bytes]) -> list[RowFacts]:
    """The facts of a block's rows, in order; runs in another process.

    Args:
        task: The block, how its rows are read, the tokenizer if every row's ids are to be made, and a token
            that is the same for all blocks of one plan.
    """
    block, reading, encoded, token = task
    items = list(parse_block(block, reading))
    refused: dict[int, DataError] = {}
    if encoded is not None:
        pairs = [(i, item) for i, item in enumerate(items) if isinstance(item, PreferencePair)]
        ids = encoder(*encoded).encode([pair for _, pair in pairs])
        refused = {i: e for (i, _), e in zip(pairs, ids, strict=True) if isinstance(e, DataError)}
    shapes = _shapes_shown(token)
    facts = []
    for i, item in enumerate(items):
        if isinstance(item, BadRow):
            facts.append(RowFacts(row_digest(item), message_digest(item), {}, item.error))
        elif isinstance(item, NotInShare):
            digest = row_digest(item)
            facts.append(RowFacts(digest, digest, {}, None, used=False))
        else:
            numbers = {WEIGHT: item.weight, MARGIN: item.margin}
            known = {name: value for name, value in numbers.items() if value is not None}
            digest = row_digest(item)
            example = None
            if encoded is None and (shape := _shape(item)) is not None and shape not in shapes:
                shapes.add(shape)
                example = _Example(shape, item)
            facts.append(
                RowFacts(
                    digest, digest, known, refused.get(i), unpaired=item.label is not None, example=example
                )
            )
    return facts


def _shape(pair: PreferencePair) -> Shape | None:
    """What a chat template may refuse a pair for, apart from its words; None for text, which needs none."""
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
