"""Finds what a step's pairs have in common, so that each sequence and each prompt is computed once.

Four completions of a prompt make six pairs: twelve sequences, of which four differ. The gradient of a
sequence that several pairs share is the sum over these pairs, so the update is the same. Prompts that begin
alike, such as the turns of a conversation or those after one system prompt, share that beginning.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dpo_opt.optimize.forward.packing import Group, packed_size, pair_group
from dpo_opt.schemas.pairs import TokenizedPair, TokenSequence

# Of a group's rows, what must be saved when it joins another. Groups are not divided among micro-batches and
# processes, so a few common tokens are not worth a larger one.
_LEAST_SAVED = 0.25
# How many groups of different prompts each of several processes should get, so that all have equal work.
_GROUPS_EACH = 4


Sides = tuple[TokenSequence | None, TokenSequence | None]
"""Chosen and rejected of a pair; None where a side is not to be computed."""


def both_sides(pair: TokenizedPair) -> Sides:
    """The two sequences of a pair."""
    chosen, rejected = pair_group(pair)
    return chosen, rejected


def own_side(pair: TokenizedPair) -> Sides:
    """Of an unpaired row, its own completion."""
    chosen, rejected = pair_group(pair)
    return (chosen, None) if pair.label else (None, rejected)


def mismatched_side(pair: TokenizedPair) -> Sides:
    """Of an unpaired row, the completion that answers another prompt."""
    chosen, rejected = pair_group(pair)
    return (None, rejected) if pair.label else (chosen, None)


class PromptGroup(NamedTuple):
    """Pairs whose prompts are equal or begin alike, and the different sequences among their sides."""

    sequences: Group
    pairs: list[int]
    """Indices of the pairs."""
    sides: list[tuple[int | None, int | None]]
    """Of each of these pairs, the places of chosen and rejected among the sequences; None: not computed."""


def prompt_groups(
    pairs: Sequence[TokenizedPair],
    *,
    rows: Callable[[Group], int],
    budget: int,
    ranks: int = 1,
    sides_of: Callable[[TokenizedPair], Sides] = both_sides,
) -> list[PromptGroup]:
    """Group pairs by their prompt, then prompts that begin alike, in the order of each group's first pair.

    Args:
        pairs: The pairs of a step.
        rows: Rows that a group takes in a forward.
        budget: Most rows of a group of several pairs. Other pairs of the prompt form the next group.
        ranks: Number of processes; of several, each gets its share of the groups of different prompts.
        sides_of: Which of a pair's sequences are computed, at least one.
    """
    groups: list[_Growing] = []
    newest: dict[bytes, _Growing] = {}
    for number, pair in enumerate(pairs):
        prompt, sides = pair.prompt_ids.tobytes(), sides_of(pair)
        group = newest.get(prompt)
        if group is None or rows(group.with_sides(sides)) > budget:
            group = newest[prompt] = _Growing()
            groups.append(group)
        group.add(number, sides)
    done = [group.done() for group in groups]
    sequences = [group.sequences for group in done]
    most = budget if ranks == 1 else min(budget, sum(map(rows, sequences)) // (_GROUPS_EACH * ranks))
    return [_one([done[i] for i in members]) for members in alike(sequences, rows=rows, most=most)]


def alike(groups: Sequence[Group], *, rows: Callable[[Group], int], most: int) -> list[list[int]]:
    """Which groups of sequences to compute as one, because their prompts begin alike.

    Args:
        groups: Each of one prompt.
        rows: Rows that a group takes in a forward.
        most: Most rows of several groups together.

    Returns:
        Places of groups, those that go together in the order in which they share most; each is in one list.
    """
    found: list[list[int]] = []
    size = 0
    # In this order prompts that begin alike are neighbours, and one stands before those that it goes on with.
    for place in sorted(range(len(groups)), key=lambda i: groups[i][0].prompt_ids.tobytes(), reverse=True):
        own = rows(groups[place])
        first = groups[found[-1][0]][:1] if found else ()
        added = own
        if first and _begin_alike(first[0], groups[place][0]):
            added = rows((*first, *groups[place])) - rows(first)
        if own - added >= _LEAST_SAVED * own and size + added <= most:
            found[-1].append(place)
            size += added
        else:
            found.append([place])
            size = own
    return sorted(found, key=min)


def _begin_alike(one: TokenSequence, other: TokenSequence) -> bool:
    """Whether the other's prompt can share as much as is worth it."""
    part = max(1, int(_LEAST_SAVED * len(other.prompt_ids)))
    return np.array_equal(one.prompt_ids[:part], other.prompt_ids[:part])


def _one(groups: Sequence[PromptGroup]) -> PromptGroup:
    """Groups of different prompts as one."""
    sequences: list[TokenSequence] = []
    sides: list[tuple[int | None, int | None]] = []
    for group in groups:
        sides += [
            (_after(len(sequences), chosen), _after(len(sequences), rejected))
            for chosen, rejected in group.sides
        ]
        sequences += group.sequences
    return PromptGroup(tuple(sequences), [pair for group in groups for pair in group.pairs], sides)


def _after(first: int, place: int | None) -> int | None:
    return None if place is None else first + place


def unique_groups(
    pairs: Iterable[TokenizedPair], sides_of: Callable[[TokenizedPair], Sides] = both_sides
) -> list[Group]:
    """The sequences of pairs by what they have in common, each once: the work that the pairs need."""
    groups = prompt_groups(list(pairs), rows=packed_size, budget=sys.maxsize, sides_of=sides_of)
    return [group.sequences for group in groups]


class _Growing:
    """A group to which pairs are added."""

    def __init__(self) -> None:
        self._places: dict[tuple[bytes, bytes | None], int] = {}
        self._sequences: list[TokenSequence] = []
        self._pairs: list[int] = []
        self._sides: list[tuple[int | None, int | None]] = []

    def with_sides(self, sides: Sides) -> Group:
        """The sequences that the group would have with this pair."""
        new = (s for s in sides if s is not None and _key(s) not in self._places)
        return (*self._sequences, *new)

    def add(self, number: int, sides: Sides) -> None:
        chosen, rejected = (None if sequence is None else self._place(sequence) for sequence in sides)
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
