"""Gives each unpaired row a completion of another prompt, by which KTO estimates a KL divergence.

KTO (Ethayarajh et al. 2024, arXiv 2402.01306, section 4.1) measures rewards from z0, the KL divergence of the
policy from the reference, which it estimates on prompts with outputs that belong to others. Which output a
prompt gets must be fixed before anything is scored, because the reference has to score it too.

TRL 1.16 rotates the completions of each micro-batch by one row, and reads the data in its order. Here those
of a shard are rotated, so that training may shuffle; by more than one row where that would lead to a
completion of the same prompt.
"""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from dpo_opt.precompute.tokens.truncation import cut_completion
from dpo_opt.schemas.pairs import TokenizedPair

NO_OTHER_PROMPT = "no_other_prompt"
"""Why a row is left out that got no such completion."""
_MOST_TRIED = 64
T = TypeVar("T")


class Mismatched(NamedTuple):
    """The rows of a shard with a completion of another prompt on the side that their label does not name."""

    rows: list[TokenizedPair]
    left_out: list[TokenizedPair]
    """Those for which the shard has no such completion."""


def with_mismatched(rows: Sequence[TokenizedPair], *, max_length: int) -> Mismatched:
    """Give each row of a shard the completion of an earlier one, the first rows those of the last.

    The distance is the most rows of one prompt that follow each other. So where prompts differ, or each has
    as many rows, every completion is given once, and desirable ones are as many among those given. A row that
    would meet its own prompt gets the completion of the next earlier row of another.

    Args:
        rows: Unpaired rows in order, with their completion on both sides.
        max_length: Most tokens of prompt plus completion; a completion is cut at its end to that.
    """
    found = Mismatched([], [])

    def beside(number: int, other: int) -> TokenizedPair | None:
        return _beside(rows[number], rows[other], max_length)

    prompts = [row.prompt_ids.tobytes() for row in rows]
    for row, given in zip(rows, first_fitting(prompts, beside), strict=True):
        if given is None:
            found.left_out.append(row)
        else:
            found.rows.append(given)
    return found


def first_fitting(prompts: Sequence[Hashable], fitting: Callable[[int, int], T | None]) -> Iterator[T | None]:
    """For each row of a shard what the first row of another prompt gives that fits, or None.

    Args:
        prompts: Of the rows, in order.
        fitting: What a row and another one give together; None where the other does not fit.
    """
    numbers: dict[Hashable, int] = {}
    numbered = [numbers.setdefault(prompt, len(numbers)) for prompt in prompts]
    distance = max((len(list(run)) for _, run in itertools.groupby(numbered)), default=0)
    before = _of_other_prompts(numbered)
    for number in range(len(numbered)):
        tried = itertools.islice(_candidates(number, distance, numbered, before), _MOST_TRIED)
        found = (fitting(number, other) for other in tried)
        yield next((given for given in found if given is not None), None)


def _of_other_prompts(prompts: Sequence[int]) -> list[int]:
    """Of each row the next earlier one of another prompt, around the end; without another, some row."""
    before = [0] * len(prompts)
    for _ in range(2):  # what stands before the first rows is known after the last
        for number, prompt in enumerate(prompts):
            before[number] = number - 1 if prompts[number - 1] != prompt else before[number - 1]
    return [number % len(prompts) for number in before]


def _candidates(number: int, distance: int, prompts: Sequence[int], before: Sequence[int]) -> Iterator[int]:
    """Rows of other prompts, from ``distance`` rows before this one on back."""
    for steps in range(distance, distance + len(prompts)):
        other = (number - steps) % len(prompts)
        if prompts[other] == prompts[number]:
            other = before[other]
        if prompts[other] != prompts[number]:
            yield other


def _beside(row: TokenizedPair, other: TokenizedPair, max_length: int) -> TokenizedPair | None:
    """The row with another's completion; None where nothing of that counts within ``max_length``."""
    room = max_length - len(row.prompt_ids)
    ids, mask = cut_completion(other.chosen_ids, other.chosen_mask, room)
    if not len(ids):
        return None
    truncated = other.chosen_truncated or len(ids) < len(other.chosen_ids)
    if row.label:
        return dataclasses.replace(row, rejected_ids=ids, rejected_mask=mask, rejected_truncated=truncated)
    return dataclasses.replace(row, chosen_ids=ids, chosen_mask=mask, chosen_truncated=truncated)
