"""What an audit keeps of every pair: hashes, lengths and flags, about 80 bytes, but never its text.

Blocks are read on several processes; their facts come back as arrays and are joined in order.
"""

import hashlib
import itertools
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dpo_opt.precompute.check.flags import flags_of
from dpo_opt.precompute.check.near_duplicates import signatures
from dpo_opt.precompute.check.other_prompts import OtherPrompts, prompt_hashes
from dpo_opt.precompute.check.places import Places
from dpo_opt.precompute.config import DataConfig, TrainOn
from dpo_opt.precompute.read.datasets import (
    BadFile,
    BadRow,
    NotInShare,
    Reading,
    parse_block,
    scan_blocks,
)
from dpo_opt.precompute.read.parallel import map_in_order
from dpo_opt.precompute.read.row_blocks import Block
from dpo_opt.precompute.tokens.templates import chat_templates
from dpo_opt.precompute.tokens.tokenize import encoder
from dpo_opt.precompute.tokens.truncation import PairIds
from dpo_opt.schemas.errors import ConfigError, DataError
from dpo_opt.schemas.pairs import PreferencePair, Text
from dpo_opt.schemas.progress import Progress

Int32s = npt.NDArray[np.int32]
Hashes = npt.NDArray[np.uint64]

EXAMPLES = 5
"""Places kept for every kind of bad row, and shown for every problem."""

NO_COMPLETION = 0
"""In the place of the hash of a side that an unpaired row does not have."""
_OWN_FIX = {"prompt_column", "two_sources", "unpaired", "unreadable_file", "wrapped"}


class BadRows(NamedTuple):
    """Rows of one kind of defect."""

    rows: int
    examples: list[tuple[str, str]]
    """Place and message of the first few."""


class Facts(NamedTuple):
    """Arrays over pairs, in order; P pairs."""

    source: Int32s
    """(P,) index of the --data argument."""
    label: Int32s
    """(P,) index into ``labels``."""
    prompt: Hashes
    opening: Hashes
    """(P,) ``opening_hash`` of the prompt."""
    chosen: Hashes
    rejected: Hashes
    characters: Int32s
    """(P, 3): of prompt, chosen, rejected."""
    tokens: Int32s
    """(P, 5): of prompt, chosen, rejected, then ``alike`` and ``uncounted`` of ``PairIds``; (P, 0) without
    model."""
    flags: npt.NDArray[np.uint32]
    signatures: npt.NDArray[np.uint32]
    """(P, permutations) MinHash signatures; (P, 0) if near duplicates are not searched."""
    labels: list[str | None]
    """Values of ``source``."""
    bad_rows: dict[tuple[int, str], BadRows]
    """By --data argument and kind."""
    forms: dict[int, str]
    """From the index of a --data argument to the form of its rows."""
    places: Places
    prompt_ids: Hashes
    """``prompt_hashes`` of the unpaired rows, (0, 1) without model."""
    numbers: npt.NDArray[np.int64]
    """(P,) number of the pair among all rows that ``--data-share`` keeps, those included that are bad."""
    rows: int
    """How many rows those are."""

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def desirable(self) -> npt.NDArray[np.bool_]:
        """(P,) unpaired rows whose completion is desirable: it counts as chosen, and there is no other."""
        found: npt.NDArray[np.bool_] = self.rejected == NO_COMPLETION
        return found

    @property
    def undesirable(self) -> npt.NDArray[np.bool_]:
        """(P,) unpaired rows whose completion is not."""
        found: npt.NDArray[np.bool_] = self.chosen == NO_COMPLETION
        return found

    def other_prompts(self, lengths: tuple[int, ...], pairs_per_shard: int) -> OtherPrompts:
        """What decides which unpaired rows get a completion of another prompt."""
        rows = np.flatnonzero(self.desirable | self.undesirable)
        return OtherPrompts(rows, self.numbers[rows] // pairs_per_shard, self.prompt_ids, lengths)

    def hashes(self, pair: int) -> tuple[int, int, int]:
        """``pair_hashes`` of a pair that was read."""
        return int(self.prompt[pair]), int(self.chosen[pair]), int(self.rejected[pair])


class Wanted(NamedTuple):
    """What is computed for each pair, in addition to hashes and lengths in characters."""

    model_folder: Path | None = None
    near_duplicates: bool = False
    train_on: TrainOn = "all"
    template_date: str | None = None
    cut_to: tuple[int, ...] = ()
    """Lengths to which prompts may be cut."""


class _BlockFacts(NamedTuple):
    facts: Facts
    places: tuple[int, bytes]


def collect(config: DataConfig, wanted: Wanted, *, processes: int, progress: Progress) -> Facts:
    """Read all data once.

    A file that cannot be read counts as a bad row of the kind ``unreadable_file``.

    Raises:
        ConfigError: The sources cannot be what is meant, or the model's tokenizer cannot be used.
        DataError: A source does not exist.
    """
    if wanted.model_folder is not None:
        encoder(wanted.model_folder)  # a tokenizer that cannot be used is refused before anything
    unreadable: dict[tuple[int, str], BadRows] = {}

    def tasks() -> Iterable[tuple[Block, Reading, Wanted]]:
        for item in scan_blocks(config):
            if isinstance(item, BadFile):
                _count(unreadable, item.source, item.error)
            else:
                yield (*item, wanted)

    progress.start("reading", total=None, unit="rows")
    blocks = []
    preload = () if wanted.model_folder is None else ("transformers.models.auto.tokenization_auto",)
    for block in map_in_order(_block_facts, tasks(), processes=processes, preload=preload):
        progress.advance(len(block.facts))
        blocks.append(block)
    progress.finish()
    return _joined(blocks, unreadable)


def text_hash(text: Text) -> int:
    """A 64-bit hash of a text, or of messages."""
    data = text if isinstance(text, str) else json.dumps(text, sort_keys=True, ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(data.encode("utf-8"), digest_size=8).digest(), "little")


def opening_hash(prompt: Text) -> int:
    """Of the first message of the user in a conversation; of a prompt without turns, of all of it."""
    if isinstance(prompt, str):
        return text_hash(prompt)
    first = next((message for message in prompt if message["role"] == "user"), None)
    return text_hash(prompt if first is None else [first])


def pair_hashes(pair: PreferencePair) -> tuple[int, int, int]:
    """Of prompt, chosen and rejected. What else the template is shown counts with the completions: it is the
    same prompt with other tools, but no completion of it is the same. An unpaired row has one of the two.
    """
    if pair.label is not None:
        prompt, completion, _ = pair_hashes(pair._replace(label=None))
        return (prompt, completion, NO_COMPLETION) if pair.label else (prompt, NO_COMPLETION, completion)
    beside = {"tools": pair.tools, "settings": pair.chat_template_kwargs}
    if any(value is not None for value in beside.values()):
        sides = [text_hash([{"text": side, **beside}]) for side in (pair.chosen, pair.rejected)]
        return text_hash(pair.prompt), sides[0], sides[1]
    return text_hash(pair.prompt), text_hash(pair.chosen), text_hash(pair.rejected)


def mixed_hash(*columns: Hashes) -> Hashes:
    """One hash of several, row by row; their order counts."""
    mixed = np.zeros(len(columns[0]), dtype=np.uint64)
    for column in columns:
        # Odd multiplier: every bit of what came before reaches the result.
        mixed = (mixed ^ column) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed


def _block_facts(task: tuple[Block, Reading, Wanted]) -> _BlockFacts:
    block, reading, wanted = task
    bad_rows: dict[tuple[int, str], BadRows] = {}
    pairs: list[PreferencePair] = []
    rows = 0
    for item in parse_block(block, reading):
        if isinstance(item, BadRow):
            _count(bad_rows, reading.source, item.error)
        elif isinstance(item, PreferencePair):
            pairs.append(item._replace(row=rows))
        rows += not isinstance(item, NotInShare)
    ids: list[PairIds] = []
    if wanted.model_folder is not None:
        pairs, ids = _encoded(pairs, wanted, wanted.model_folder, reading.source, bad_rows)
    labels: dict[str | None, int] = {}
    codes = [labels.setdefault(pair.source, len(labels)) for pair in pairs]
    columns = np.array([pair_hashes(pair) for pair in pairs], dtype=np.uint64).reshape(len(pairs), 3).T
    implicit = reading.first is not None and reading.first[0].name == 'text without "prompt"'
    encoded = ids or itertools.repeat(None)
    flags = [
        flags_of(pair, found, folder=wanted.model_folder, implicit=implicit)
        for pair, found in zip(pairs, encoded, strict=False)
    ]
    names = "\0".join(pair.where for pair in pairs).encode("utf-8", errors="surrogateescape")
    facts = Facts(
        source=np.full(len(pairs), reading.source, dtype=np.int32),
        label=np.array(codes, dtype=np.int32),
        prompt=columns[0],
        opening=np.array([opening_hash(pair.prompt) for pair in pairs], dtype=np.uint64),
        chosen=columns[1],
        rejected=columns[2],
        characters=_table(
            [[_characters(t) for t in (p.prompt, p.chosen, p.rejected)] for p in pairs], 3, height=len(pairs)
        ),
        tokens=_table(
            [
                # One completion is not left out for being like itself.
                [*map(len, e[:3]), e.alike if pair.label is None else 0, e.uncounted]
                for pair, e in zip(pairs if ids else [], ids, strict=True)
            ],
            5 if ids else 0,
            height=len(pairs),
        ),
        flags=np.array(flags, dtype=np.uint32),
        signatures=signatures(pairs if wanted.near_duplicates else [], rows=len(pairs)),
        labels=list(labels),
        bad_rows=bad_rows,
        forms={} if reading.first is None else {reading.source: reading.first[0].name},
        places=Places([]),
        prompt_ids=prompt_hashes(pairs, ids, wanted.cut_to),
        numbers=np.array([pair.row for pair in pairs], dtype=np.int64),
        rows=rows,
    )
    return _BlockFacts(facts, (len(pairs), zlib.compress(names, 1)))


def _encoded(
    pairs: list[PreferencePair],
    wanted: Wanted,
    folder: Path,
    source: int,
    bad_rows: dict[tuple[int, str], BadRows],
) -> tuple[list[PreferencePair], list[PairIds]]:
    """The pairs that the tokenizer takes, with their ids; the others are counted as bad rows."""
    tokenizer = encoder(folder, wanted.template_date, wanted.train_on)
    try:
        encoded = tokenizer.encode(pairs)
    except ConfigError as error:
        if chat_templates(tokenizer.tokenizer):
            raise  # it is not the rows that must be changed
        for pair in pairs:
            _count(bad_rows, source, DataError(error.what, where=pair.where, kind="no_chat_template"))
        return [], []
    kept, ids = [], []
    for pair, found in zip(pairs, encoded, strict=True):
        if isinstance(found, DataError):
            _count(bad_rows, source, found)
        else:
            kept.append(pair)
            ids.append(found)
    return kept, ids


def _count(bad_rows: dict[tuple[int, str], BadRows], source: int, error: DataError) -> None:
    # Which of several settings reads a row is known to its own error alone.
    what = f"{error.what} ({error.fix})" if error.kind in _OWN_FIX else error.what
    _add(bad_rows, (source, str(error.kind)), BadRows(1, [(str(error.where), what)]))


def _add(bad_rows: dict[tuple[int, str], BadRows], key: tuple[int, str], more: BadRows) -> None:
    rows, examples = bad_rows.get(key, BadRows(0, []))
    bad_rows[key] = BadRows(rows + more.rows, [*examples, *more.examples][:EXAMPLES])


def _table(rows: list[list[int]], columns: int, *, height: int) -> Int32s:
    return np.array(rows, dtype=np.int32).reshape(height, columns)


def _characters(text: Text) -> int:
    """Characters of a text, or of all that messages say: contents, thoughts, and calls of tools as JSON."""
    if isinstance(text, str):
        return len(text)
    said = (value for message in text for key, value in message.items() if key != "role" and value)
    return sum(len(value if isinstance(value, str) else json.dumps(value)) for value in said)


def _joined(blocks: Sequence[_BlockFacts], unreadable: dict[tuple[int, str], BadRows]) -> Facts:
    labels: dict[str | None, int] = {}
    bad_rows = dict(unreadable)
    forms: dict[int, str] = {}
    codes, numbers, rows = [], [], 0
    for facts, _ in blocks:
        numbers.append(facts.numbers + rows)
        rows += facts.rows
        places = np.array([labels.setdefault(label, len(labels)) for label in facts.labels], dtype=np.int32)
        codes.append(places[facts.label] if len(facts) else facts.label)
        for key, found in facts.bad_rows.items():
            _add(bad_rows, key, found)
        forms = facts.forms | forms

    # A block without a pair has no width to join by.
    filled = [facts for facts, _ in blocks if len(facts)]

    def column(name: str, dtype: type, width: tuple[int, ...] = ()) -> Any:
        parts = [getattr(facts, name) for facts in filled]
        return np.concatenate(parts) if parts else np.zeros((0, *width), dtype=dtype)

    return Facts(
        source=column("source", np.int32),
        label=np.concatenate(codes) if codes else np.zeros(0, dtype=np.int32),
        prompt=column("prompt", np.uint64),
        opening=column("opening", np.uint64),
        chosen=column("chosen", np.uint64),
        rejected=column("rejected", np.uint64),
        characters=column("characters", np.int32, (3,)),
        tokens=column("tokens", np.int32, (0,)),
        flags=column("flags", np.uint32),
        signatures=column("signatures", np.uint32, (0,)),
        labels=list(labels),
        bad_rows=bad_rows,
        forms=forms,
        places=Places([place for _, place in blocks]),
        prompt_ids=column("prompt_ids", np.uint64, (1,)),
        numbers=np.concatenate(numbers) if numbers else np.zeros(0, dtype=np.int64),
        rows=rows,
    )
