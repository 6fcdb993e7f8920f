"""What may be wrong with a pair by itself, as bits."""

import functools
import re
from pathlib import Path

from dpo_opt.precompute.tokens.ends import Ends
from dpo_opt.precompute.tokens.special_tokens import SpecialTexts, special_tokens
from dpo_opt.precompute.tokens.tokenize import encoder
from dpo_opt.precompute.tokens.truncation import PairIds
from dpo_opt.schemas.pairs import PreferencePair, Text

_SHORT_PROMPT = 8  # characters; what two texts share by chance ("The ", "I am ") is not a question
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class Flag:
    """What may be wrong with a pair, whatever the other pairs are; bits of ``Facts.flags``."""

    MERGED = 1
    SPECIAL_TOKEN = 2
    BLANK_COMPLETION = 4
    REPEATED_PROMPT = 8
    SHORT_PROMPT = 16
    EMPTY_TURN = 32
    CONTROL_CHARACTER = 64
    NEGATIVE_MARGIN = 128
    ZERO_MARGIN = 256
    EARLIER_THOUGHT = 512
    NO_END = 1024
    UNKNOWN_END = 2048
    SEVERAL_ENDS = 4096
    ADDED_END = 8192
    PROMPT_END = 16384
    NO_WEIGHT = 32768
    ANSWERED_PROMPT = 65536


ODD_ENDS: dict[str, int] = {
    "no_end": Flag.NO_END,
    "unknown_end": Flag.UNKNOWN_END,
    "several_ends": Flag.SEVERAL_ENDS,
    "added_end": Flag.ADDED_END,
    "prompt_end": Flag.PROMPT_END,
}


def flags_of(pair: PreferencePair, ids: PairIds | None, *, folder: Path | None, implicit: bool) -> int:
    """The bits of a pair.

    Args:
        pair: As it was read.
        ids: Its ids, before it is cut; None without a model.
        folder: Of the model.
        implicit: The prompt is what both completions begin with.
    """
    flags = 0
    if ids is not None and folder is not None:
        flags |= Flag.MERGED * ids.merged | Flag.EARLIER_THOUGHT * ids.forgets
        for kind in _ends(folder).odd(ids, plain=isinstance(pair.prompt, str)):
            flags |= ODD_ENDS[kind]
    if pair.weight == 0:
        flags |= Flag.NO_WEIGHT
    if pair.margin is not None or pair.rated is not None:
        better = min(found for found in (pair.margin, pair.rated) if found is not None)
        if better <= 0:
            flags |= Flag.NEGATIVE_MARGIN if better else Flag.ZERO_MARGIN
    prompt, chosen, rejected = (_contents(text) for text in (pair.prompt, pair.chosen, pair.rejected))
    everything = [*prompt, *chosen, *rejected]
    if any(_CONTROL.search(text) for text in everything):
        flags |= Flag.CONTROL_CHARACTER
    if folder is not None and any(map(_special_texts(folder).in_text, everything)):
        flags |= Flag.SPECIAL_TOKEN
    for completion in (pair.chosen, pair.rejected):
        if isinstance(completion, str) and not completion.strip():
            flags |= Flag.BLANK_COMPLETION
    if all(_speaks(part, place) for part, place in ((pair.prompt, -1), (pair.chosen, 0), (pair.rejected, 0))):
        flags |= Flag.ANSWERED_PROMPT
    if isinstance(pair.prompt, str):
        if len(pair.prompt) >= _SHORT_PROMPT and (
            chosen[0].startswith(pair.prompt) or rejected[0].startswith(pair.prompt)
        ):
            flags |= Flag.REPEATED_PROMPT
        if implicit and len(pair.prompt) < _SHORT_PROMPT:
            flags |= Flag.SHORT_PROMPT
    elif not all(
        str(message["content"]).strip() or "tool_calls" in message
        for part in (pair.prompt, pair.chosen, pair.rejected)
        for message in part
        if isinstance(message, dict)
    ):
        flags |= Flag.EMPTY_TURN
    return flags


def _speaks(part: Text, place: int) -> bool:
    """Whether a message is the assistant's."""
    return not isinstance(part, str) and bool(part) and part[place]["role"] == "assistant"


def _contents(text: Text) -> list[str]:
    return [text] if isinstance(text, str) else [str(message["content"]) for message in text]


@functools.cache
def _special_texts(folder: Path) -> SpecialTexts:
    """Finds special tokens in texts; EOS at the end is where it belongs."""
    tokenizer = encoder(folder).tokenizer
    return SpecialTexts(special_tokens(tokenizer, folder), end=str(tokenizer.eos_token))


@functools.cache
def _ends(folder: Path) -> Ends:
    own = encoder(folder)
    return Ends(own.tokenizer, folder, added=own.added)
