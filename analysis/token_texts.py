"""Decodes a pair's token ids to text that is safe to show in a report.

The text may come from a model or a stranger. Control characters are removed here, and the template escapes
markup.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import polars as pl

from dpo_opt.schemas.locations import AnyPath
from dpo_opt.schemas.manifest import TOKENIZER
from dpo_opt.schemas.safe_text import printable

_CHARACTERS = 900
# 900 characters never need more ids than this, but a prompt may have a hundred thousand.
_IDS = 2000


class Part(NamedTuple):
    """A piece of a completion."""

    text: str
    context: bool
    """Whether it is what users and tools say, which does not count."""


class PairText(NamedTuple):
    """One pair as text, each side cut to a length that fits on a page."""

    prompt: str
    chosen: list[Part]
    rejected: list[Part]


class TokenDecoder:
    """Decodes the ids of a shard folder; if the folder has no usable tokenizer, the ids are the text."""

    def __init__(self, shards_dir: AnyPath) -> None:
        self.problem: str | None = None
        """Why ids are shown instead of text, in one sentence."""
        self._tokenizer = None
        file = shards_dir / TOKENIZER / "tokenizer.json"
        if not file.is_file():
            self.problem = (
                f"Token ids are shown because there is no {TOKENIZER}/tokenizer.json in the shards."
            )
            return
        try:
            from tokenizers import Tokenizer
        except ImportError:
            self.problem = "Token ids are shown because the package tokenizers is not installed."
            return
        try:
            self._tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception:  # the only class that the Rust library raises
            self.problem = f"Token ids are shown because {TOKENIZER}/tokenizer.json is not readable."

    def text(self, ids: Sequence[int]) -> str:
        """The text of the ids, with special tokens and without control characters."""
        if self._tokenizer is None:
            return " ".join(map(str, ids))
        return printable(self._tokenizer.decode(list(ids), skip_special_tokens=False))


def pair_texts(shards: pl.LazyFrame, rows: Sequence[int], decoder: TokenDecoder) -> dict[int, PairText]:
    """The text of some pairs, by row: the end of the prompt and the start of both completions."""
    found = (
        shards.filter(pl.col("row").is_in(list(rows)))
        .select(
            "row",
            "prompt_length",
            "chosen_length",
            "rejected_length",
            pl.col("prompt_ids").list.tail(_IDS),
            pl.col("chosen_ids").list.head(_IDS),
            pl.col("rejected_ids").list.head(_IDS),
            pl.col("chosen_mask").list.head(_IDS),
            pl.col("rejected_mask").list.head(_IDS),
        )
        .collect(engine="streaming")
    )
    texts = {}
    for row in found.iter_rows(named=True):
        chosen, rejected = (
            _head(_parts(row[f"{side}_ids"], row[f"{side}_mask"], decoder), more=row[f"{side}_length"] > _IDS)
            for side in ("chosen", "rejected")
        )
        prompt = _tail(decoder.text(row["prompt_ids"]), more=row["prompt_length"] > _IDS)
        texts[row["row"]] = PairText(prompt, chosen, rejected)
    return texts


def prompt_end(ids: Sequence[int], decoder: TokenDecoder) -> str:
    """The end of a prompt as text."""
    return _tail(decoder.text(ids[-_IDS:]), more=len(ids) > _IDS)


def completion_start(ids: Sequence[int], decoder: TokenDecoder) -> str:
    """The start of a completion as text, all of which counts."""
    return plain(_head(_parts(ids[:_IDS], None, decoder), more=len(ids) > _IDS))


def plain(parts: Sequence[Part]) -> str:
    """The text of a side."""
    return "".join(part.text for part in parts)


def _parts(ids: Sequence[int], mask: Sequence[bool] | None, decoder: TokenDecoder) -> list[Part]:
    """The text of a completion, divided where tokens begin or cease to count."""
    if mask is None:
        return [Part(decoder.text(ids), context=False)]
    runs = itertools.groupby(zip(ids, mask, strict=True), key=lambda token: token[1])
    return [Part(decoder.text([i for i, _ in run]), context=not counts) for counts, run in runs]


def _head(parts: list[Part], *, more: bool) -> list[Part]:
    room = _CHARACTERS
    found = []
    for part in parts:
        found.append(part._replace(text=part.text[:room]))
        if len(part.text) > room:
            more = True
            break
        room -= len(part.text)
    return [*found, Part(" […]", context=False)] if more else found


def _tail(text: str, *, more: bool) -> str:
    return f"[…] {text[-_CHARACTERS:]}" if more or len(text) > _CHARACTERS else text
