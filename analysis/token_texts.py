"""Decodes a pair's token ids to text that is safe to show in a report, with what training did to each token.

The text may come from a model or a stranger. Control characters are removed here, and the template escapes
markup.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from dpo_opt.analysis.intervals import FloatArray
from dpo_opt.schemas.locations import AnyPath
from dpo_opt.schemas.manifest import TOKENIZER
from dpo_opt.schemas.safe_text import printable

_CHARACTERS = 900
# 900 characters never need more ids than this, but a prompt may have a hundred thousand.
_IDS = 2000


# In nats. A token whose log-prob moved by less than the first stays without a colour.
_SHADES = (0.05, 0.2, 0.5, 1.0)


class Part(NamedTuple):
    """A piece of a completion."""

    text: str
    context: bool
    """Whether it is what users and tools say, which does not count."""
    logratio: float | None = None
    """log policy - log reference of its tokens, in nats; None if it is not known."""

    @property
    def shade(self) -> str:
        """How far its log-prob moved: ``up1`` to ``up4``, ``down1`` to ``down4``, or nothing."""
        if self.logratio is None or not math.isfinite(self.logratio):
            return ""
        level = sum(abs(self.logratio) >= least for least in _SHADES)
        return f"{'up' if self.logratio > 0 else 'down'}{level}" if level else ""


class PairText(NamedTuple):
    """One pair as text, each side cut to a length that fits on a page; its log-ratios are cut nowhere."""

    pair_id: str
    prompt: str
    chosen: list[Part]
    rejected: list[Part]

    @property
    def has_logratios(self) -> bool:
        """Whether every token that counts has its log-ratio."""
        return all(part.logratio is not None for part in (*self.chosen, *self.rejected) if not part.context)


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
            # Not from_str, which raises plain Exception.
            self._tokenizer = Tokenizer.from_buffer(file.read_bytes())
        except (OSError, ValueError):
            self.problem = f"Token ids are shown because {TOKENIZER}/tokenizer.json is not readable."

    def text(self, ids: Sequence[int]) -> str:
        """The text of the ids, with special tokens and without control characters."""
        if self._tokenizer is None:
            return " ".join(map(str, ids))
        return printable(self._tokenizer.decode(list(ids), skip_special_tokens=False))


def pair_texts(
    shards: pl.LazyFrame, rows: Sequence[int], decoder: TokenDecoder, policy: pl.LazyFrame | None = None
) -> dict[int, PairText]:
    """The text of some pairs, by row: the end of the prompt and the start of both completions.

    Args:
        shards: From ``scan_shards``.
        rows: Row numbers.
        decoder: Of the same shards.
        policy: One state of the policy, from ``scan_pair_logps``. Where it has the log-probs of single
            tokens, each part gets its log-ratio, and those of a side sum to the side's.
    """
    wanted = pl.col("row").is_in(list(rows))
    found = (
        shards.filter(wanted)
        .select(
            "row",
            "pair_id",
            "prompt_length",
            pl.col("prompt_ids").list.tail(_IDS),
            *(f"{side}_ids" for side in ("chosen", "rejected")),
            *(f"{side}_mask" for side in ("chosen", "rejected")),
            *(f"ref_{side}_token_logps" for side in ("chosen", "rejected")),
        )
        .collect(engine="streaming")
    )
    moved = {}
    if policy is not None:
        columns = ("row", "chosen_token_logps", "rejected_token_logps")
        scored = policy.filter(wanted).select(columns).unique("row", keep="any").collect(engine="streaming")
        moved = {row: (chosen, rejected) for row, chosen, rejected in scored.iter_rows()}
    texts = {}
    for row in found.iter_rows(named=True):
        chosen, rejected = (
            _side(row[f"{side}_ids"], row[f"{side}_mask"], row[f"ref_{side}_token_logps"], logps, decoder)
            for side, logps in zip(("chosen", "rejected"), moved.get(row["row"], (None, None)), strict=True)
        )
        prompt = _tail(decoder.text(row["prompt_ids"]), more=row["prompt_length"] > _IDS)
        texts[row["row"]] = PairText(row["pair_id"], prompt, chosen, rejected)
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


def _side(
    ids: Sequence[int],
    mask: Sequence[bool] | None,
    ref: Sequence[float],
    policy: Sequence[float] | None,
    decoder: TokenDecoder,
) -> list[Part]:
    counts = np.ones(len(ids), dtype=bool) if mask is None else np.array(mask)
    if policy is None or len(policy) != counts.sum():
        shown = None if mask is None else mask[:_IDS]
        return _head(_parts(ids[:_IDS], shown, decoder), more=len(ids) > _IDS)
    logratio = np.zeros(len(ids))
    logratio[counts] = np.array(policy, dtype=np.float64) - np.array(ref, dtype=np.float64)[counts]
    return _coloured(ids, counts.tolist(), logratio, decoder)


def _coloured(
    ids: Sequence[int], counts: Sequence[bool], logratio: FloatArray, decoder: TokenDecoder
) -> list[Part]:
    """A part for every token, or for several that are one character; the last one is all that is cut."""
    parts: list[Part] = []
    start, written = 0, ""
    for stop in range(1, len(ids) + 1):
        if len(written) >= _CHARACTERS:
            break
        text = decoder.text(ids[:stop])
        last = stop == len(ids) or counts[stop] != counts[start]
        # Half a character decodes to a mark of its own, which the next token replaces.
        if not last and (text.endswith("\N{REPLACEMENT CHARACTER}") or not text.startswith(written)):
            continue
        piece = text[len(written) :] if text.startswith(written) else text
        parts.append(
            Part(piece, not counts[start], float(logratio[start:stop].sum()) if counts[start] else None)
        )
        start, written = stop, text
    if start < len(ids):
        rest = float(logratio[start:].sum())
        cut = f" [… {len(ids) - start} more tokens: {rest:+.2f}]".replace("-", "−")
        parts.append(Part(cut, False, rest))
    return parts


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
