"""Finds what a step's pairs have in common, so that each sequence and each prompt is computed once.

Four completions of a prompt make six pairs: twelve sequences, of which four differ. The gradient of a
sequence that several pairs share is the sum over these pairs, so the update is the same.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from dpo_opt.optimize.forward.packing import Group, pair_group
from dpo_opt.schemas.pairs import TokenizedPair, TokenSequence


class PromptGroup(NamedTuple):
    """Pairs of one prompt, and the different sequences among their sides."""

    sequences: Group
    pairs: list[int]
    """Indices of the pairs."""
    sides: list[tuple[int, int]]
    """Of each of these pairs, the places of chosen and rejected among the sequences."""


def prompt_groups(
    pairs: Sequence[TokenizedPair], *, rows: Callable[[Group], int], budget: int
) -> list[PromptGroup]:
    """Group pairs by their prompt, in the order of each group's first pair.

    Args:
        pairs: The pairs of a step.
        rows: Rows that a group takes in a forward.
        budget: Most rows of a group of several pairs. Other pairs of the prompt form the next group.
    """
    groups: list[_Growing] = []
    newest: dict[bytes, _Growing] = {}
    for number, pair in enumerate(pairs):
        prompt = pair.prompt_ids.tobytes()
        group = newest.get(prompt)
        if group is None or rows(group.with_sides_of(pair)) > budget:
            group = newest[prompt] = _Growing()
            groups.append(group)
        group.add(number, pair)
    return [group.done() for group in groups]


def unique_groups(pairs: Iterable[TokenizedPair]) -> list[Group]:
    """The sequences of pairs by prompt, each sequence once: the work that the pairs need."""
    return [group.sequences for group in prompt_groups(list(pairs), rows=len, budget=sys.maxsize)]


class _Growing:
    """A group to which pairs are added."""

    def __init__(self) -> None:
        self._places: dict[tuple[bytes, bytes | None], int] = {}
        self._sequences: list[TokenSequence] = []
        self._pairs: list[int] = []
        self._sides: list[tuple[int, int]] = []

    def with_sides_of(self, pair: TokenizedPair) -> Group:
        """The sequences that the group would have with this pair."""
        return (*self._sequences, *(s for s in pair_group(pair) if _key(s) not in self._places))

    def add(self, number: int, pair: TokenizedPair) -> None:
        chosen, rejected = (self._place(sequence) for sequence in pair_group(pair))
        self._pairs.append(number)
        self._sides.append((chosen, rejected))

    def done(self) -> PromptGroup:
        return PromptGroup(tuple(self._sequences), self._pairs, self._sides)

    def _place(self, sequence: TokenSequence) -> int:
        place = self._places.setdefault(_key(sequence), len(self._sequences))
        if place == len(self._sequences):
            self._sequences.append(sequence)
        return place


def _key(sequence: TokenSequence) -> tuple[bytes, bytes | None]:
    """Equal for completions of one prompt with equal ids of which the same tokens count."""
    mask = sequence.mask
    return sequence.completion_ids.tobytes(), None if mask is None else mask.tobytes()
