"""A pair's ids, divided where the prompt ends and cut to what is scored, or why the pair is left out."""

from typing import Literal, NamedTuple, assert_never

import numpy as np

from dpo_opt.precompute.config import Truncation
from dpo_opt.schemas.pairs import IdArray, MaskArray

DropReason = Literal[
    "empty_prompt",
    "empty_completion",
    "identical_completions",
    "prompt_fills_max_length",
    "completion_fills_max_length",
    "longer_than_max_length",
    "nothing_counts_after_truncation",
    "identical_after_truncation",
]

DROP_REASONS: dict[DropReason, str] = {
    "empty_prompt": "the prompt has no token, so nothing predicts a completion's first token",
    "empty_completion": "a completion has no token of its own, or none of a turn that is trained on",
    "identical_completions": "chosen and rejected are the same ids, so the pair prefers nothing",
    "prompt_fills_max_length": "keep_start: the prompt leaves no room for a completion token",
    "completion_fills_max_length": "keep_end: a completion leaves no room for a prompt token",
    "longer_than_max_length": "drop: a sequence is longer than max_length",
    "nothing_counts_after_truncation": "keep_start: every token of a turn that is trained on was cut off",
    "identical_after_truncation": "keep_start: what made the completions differ was cut off",
}
"""Why a row was left out, in the order in which the reasons are tried."""

DROP_FIXES: dict[str, str] = {
    "empty_prompt": "give the rows a prompt, or pass `--column prompt=NAME` where another column holds it",
    "empty_completion": "add the missing text; `dpo-opt preview DATA --model M` shows where none is left",
    "identical_completions": "let chosen and rejected differ, or pass `--column rejected=NAME` where another "
    "column holds the rejected completion",
}
"""What makes a row usable that was left out for a reason that no ``max_length`` changes."""


class PairIds(NamedTuple):
    """A pair's token ids before truncation, divided where the prompt ends."""

    prompt: IdArray
    chosen: IdArray
    rejected: IdArray
    merged: bool = False
    """The prompt's last tokens merged with what follows, and count as completion."""
    chosen_mask: MaskArray | None = None
    """Which tokens of the completion count, the last one among them; None: all."""
    rejected_mask: MaskArray | None = None
    forgets: bool = False
    """The chat template leaves out a thought of an earlier turn in the prompt."""

    @property
    def shared(self) -> int:
        """How many tokens both completions begin with."""
        return _common_prefix_length(self.chosen, self.rejected)

    @property
    def alike(self) -> int:
        """The most tokens that may be kept of both completions while what is left of them is the same.

        What is cut is followed by what counts no more, so this is ``shared`` and the context behind it.
        """
        shared = self.shared
        if self.chosen_mask is None and self.rejected_mask is None:
            return shared
        sides = ((self.chosen, self.chosen_mask), (self.rejected, self.rejected_mask))
        longer = [mask for ids, mask in sides if len(ids) > shared]
        return shared + min((_uncounted(None if m is None else m[shared:]) for m in longer), default=0)

    @property
    def uncounted(self) -> int:
        """How many tokens stand before the first one that counts, on the side with more of them."""
        return max(_uncounted(self.chosen_mask), _uncounted(self.rejected_mask))


def _uncounted(mask: MaskArray | None) -> int:
    return 0 if mask is None else int(mask.argmax())


def split_ids(
    prompt: IdArray,
    chosen: IdArray,
    rejected: IdArray,
    chosen_mask: MaskArray | None,
    rejected_mask: MaskArray | None,
    *,
    behind: int,
) -> PairIds:
    """Divide the ids of prompt + completion where all three begin to differ.

    The masks are of prompt + completion too. ``behind`` is how many tokens the tokenizer adds behind any
    text: that they are not behind a prompt that goes on is no merging.
    """
    boundary = min(_common_prefix_length(prompt, chosen), _common_prefix_length(prompt, rejected))
    sides = [
        _up_to_what_counts(ids[boundary:], None if mask is None else mask[boundary:])
        for ids, mask in ((chosen, chosen_mask), (rejected, rejected_mask))
    ]
    (chosen_ids, chosen_mask), (rejected_ids, rejected_mask) = sides
    merged = boundary < len(prompt) - behind
    return PairIds(chosen[:boundary], chosen_ids, rejected_ids, merged, chosen_mask, rejected_mask)


def _up_to_what_counts(ids: IdArray, mask: MaskArray | None) -> tuple[IdArray, MaskArray | None]:
    """A completion without the context behind its last token that counts: nothing depends on it."""
    if mask is None:
        return ids, None
    stop = int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else 0
    return ids[:stop], None if mask[:stop].all() else mask[:stop]


def fit_ids(ids: PairIds, *, max_length: int, truncation: Truncation, unpaired: bool) -> PairIds | DropReason:
    """The pair's ids within ``max_length``, or why there are none.

    ``unpaired``: of a row with one completion, which stands on both sides and need not differ.
    """
    prompt, chosen, rejected, merged, chosen_mask, rejected_mask, _ = ids
    longest = max(len(chosen), len(rejected))
    if len(prompt) == 0:
        return "empty_prompt"
    if min(len(chosen), len(rejected)) == 0:
        return "empty_completion"
    if not unpaired and np.array_equal(chosen, rejected):
        return "identical_completions"
    match truncation:
        case "keep_start":
            room = max_length - len(prompt)
            if room < 1:
                return "prompt_fills_max_length"
            chosen, chosen_mask = cut_completion(chosen, chosen_mask, room)
            rejected, rejected_mask = cut_completion(rejected, rejected_mask, room)
            if min(len(chosen), len(rejected)) == 0:
                return "nothing_counts_after_truncation"
            if not unpaired and np.array_equal(chosen, rejected):
                return "identical_after_truncation"
        case "keep_end":
            room = max_length - longest
            if room < 1:
                return "completion_fills_max_length"
            prompt = prompt[-room:]
        case "drop":
            if len(prompt) + longest > max_length:
                return "longer_than_max_length"
        case _:
            assert_never(truncation)
    return PairIds(prompt, chosen, rejected, merged, chosen_mask, rejected_mask)


def cut_completion(ids: IdArray, mask: MaskArray | None, room: int) -> tuple[IdArray, MaskArray | None]:
    """The first ``room`` tokens of a completion, up to the last that counts; none where none counts."""
    return _up_to_what_counts(ids[:room], None if mask is None else mask[:room])


def _common_prefix_length(a: IdArray, b: IdArray) -> int:
    shortest = min(len(a), len(b))
    differs = a[:shortest] != b[:shortest]
    return int(differs.argmax()) if differs.any() else shortest
