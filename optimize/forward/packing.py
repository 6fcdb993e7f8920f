"""Packs pairs into batches without padding, and computes the prompt that a pair shares only once.

Chosen and rejected share their prompt, and often their first words. A packed row holds the first sequence of
a group, followed by the rest of each other one, after what it has in common with the first:

    [ chosen | rest of rejected | next pair ... ]

For each rest, position ids continue after the common beginning. The attention (attention.py) lets each rest
see only that beginning and itself. The last token of a sequence is not fed, because it predicts nothing.
Packing changes how much is computed, never which pairs share an optimizer step.

    T = rows of tokens in the batch, S = scored tokens, B = sequences per padded batch
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_opt.schemas.pairs import IdArray, TokenizedPair, TokenSequence


class Segment(NamedTuple):
    """Consecutive rows that attend causally to themselves, and before that to a shared prefix.

    Segments cover all rows in order; a prefix is the beginning of the segment that starts where it starts.
    """

    start: int
    stop: int
    prefix_start: int
    prefix_stop: int


class VarlenIndex(NamedTuple):
    """The same segments in the form that a fused kernel takes: where each one's queries and keys begin.

    A prefix belongs to several segments, so keys and values are first gathered into N rows.
    """

    key_rows: Tensor | None  # (N,) int64 packed row of each key; None: the packed rows as they are
    query_starts: Tensor  # (segments + 1,) int32, from 0 to T
    key_starts: Tensor  # (segments + 1,) int32, from 0 to N
    longest_query: int
    """Rows of the longest segment."""
    longest_key: int
    """Most keys of a segment, its prefix included."""

    def to(self, device: torch.device) -> "VarlenIndex":
        """The same index on a device."""
        key_rows = None if self.key_rows is None else to_device(self.key_rows, device)
        starts = (to_device(self.query_starts, device), to_device(self.key_starts, device))
        return VarlenIndex(key_rows, *starts, self.longest_query, self.longest_key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The model's input, and the row that predicts each scored token."""

    input_ids: Tensor  # (1, T) packed, or (B, T) padded
    model_kwargs: dict[str, object]
    """``position_ids``, ``segments`` and ``varlen`` when packed, ``attention_mask`` when padded."""
    scored_rows: Tensor  # (S,) row of the flattened hidden states that predicts the token
    targets: Tensor  # (S,)
    lengths: list[int]
    """Scored tokens of each sequence, those that count, in order; they sum to S."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        kwargs = dict(self.model_kwargs)
        for name, value in kwargs.items():
            if isinstance(value, Tensor):
                kwargs[name] = to_device(value, device)
            elif isinstance(value, VarlenIndex):
                kwargs[name] = value.to(device)
        return Batch(
            input_ids=to_device(self.input_ids, device),
            model_kwargs=kwargs,
            scored_rows=to_device(self.scored_rows, device),
            targets=to_device(self.targets, device),
            lengths=self.lengths,
        )


Group = tuple[TokenSequence, ...]
"""Sequences that begin alike: the two sides of a pair, all completions of a prompt, or those of prompts of
which one goes on with the other."""


def pair_group(pair: TokenizedPair) -> Group:
    """The two sequences of a pair: chosen, then rejected."""
    return (
        TokenSequence(pair.prompt_ids, pair.chosen_ids, pair.chosen_mask),
        TokenSequence(pair.prompt_ids, pair.rejected_ids, pair.rejected_mask),
    )


def shared_lengths(group: Group) -> list[int]:
    """Rows that each sequence shares with the first: the common prefix, below both lengths. The first: 0."""
    first = _joined(group[0])
    return [0, *(_common(first, _joined(sequence)) for sequence in group[1:])]


def _common(one: IdArray, other: IdArray) -> int:
    limit = min(len(one), len(other)) - 1
    different = np.flatnonzero(one[:limit] != other[:limit])
    return int(different[0]) if len(different) else limit


def packed_size(group: Group) -> int:
    """Rows the group takes in a packed batch."""
    fed = sum(len(s.prompt_ids) + len(s.completion_ids) - 1 for s in group)
    return fed - sum(shared_lengths(group))


def padded_width(group: Group) -> int:
    """Rows that the group's longest sequence takes: in a padded batch, every sequence takes as many."""
    return max(len(s.prompt_ids) + len(s.completion_ids) - 1 for s in group)


def plan_bins(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices grouped so that each group's sizes stay within ``budget``: first fit, longest first.

    An item larger than the budget gets a bin of its own.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fit = next((b for b, free in enumerate(room) if sizes[index] <= free), None)
        if fit is None:
            bins.append([index])
            room.append(budget - sizes[index])
        else:
            bins[fit].append(index)
            room[fit] -= sizes[index]
    return bins


def plan_padded_bins(groups: Sequence[Group], budget: int) -> list[list[int]]:
    """Indices of neighbours in length, longest first, so that each padded batch stays within ``budget`` rows.

    A group larger than the budget gets a bin of its own.
    """
    widths = [padded_width(group) for group in groups]
    bins: list[list[int]] = []
    width = sequences = 0
    for index in sorted(range(len(groups)), key=lambda i: (-widths[i], i)):
        if bins and width * (sequences + len(groups[index])) <= budget:
            bins[-1].append(index)
            sequences += len(groups[index])
        else:
            bins.append([index])
            width, sequences = widths[index], len(groups[index])
    return bins


def pack(groups: Sequence[Group]) -> Batch:
    """One packed row of all groups, prefixes shared."""
    ids: list[IdArray] = []
    positions: list[np.ndarray] = []
    segments: list[Segment] = []
    rows: list[np.ndarray] = []
    targets: list[IdArray] = []
    lengths: list[int] = []
    end = 0
    for group in groups:
        prefix_start = end
        # The first sequence of a group is laid out whole; the others go on from its beginning.
        for begin, sequence in zip(shared_lengths(group), group, strict=True):
            joined = _joined(sequence)
            fed = len(joined) - 1
            ids.append(joined[begin:fed])
            positions.append(np.arange(begin, fed))
            prefix_stop = prefix_start + begin
            if fed > begin:
                segments.append(Segment(end, end + fed - begin, prefix_start, prefix_stop))
            # Position p sits in the first sequence's rows, or in this one's own.
            own = end - begin
            scored, tokens = _scored(sequence)
            rows.append(np.where(scored < begin, scored + prefix_start, scored + own))
            targets.append(tokens)
            lengths.append(len(tokens))
            end += fed - begin
    return Batch(
        input_ids=_long(ids)[None],
        model_kwargs={
            "position_ids": _long(positions)[None],
            "segments": tuple(segments),
            "varlen": varlen_index(segments),
        },
        scored_rows=_long(rows),
        targets=_long(targets),
        lengths=lengths,
    )


def varlen_index(segments: Sequence[Segment]) -> VarlenIndex:
    """The index of segments that cover the packed rows in order."""
    queries = [s.stop - s.start for s in segments]
    keys = [s.stop - s.start + s.prefix_stop - s.prefix_start for s in segments]
    key_rows = None
    if keys != queries:
        parts = (span for s in segments for span in ((s.prefix_start, s.prefix_stop), (s.start, s.stop)))
        key_rows = _long([np.arange(*part) for part in parts])
    return VarlenIndex(
        key_rows=key_rows,
        query_starts=_starts(queries),
        key_starts=_starts(keys),
        longest_query=max(queries),
        longest_key=max(keys),
    )


def pad(groups: Sequence[Group]) -> Batch:
    """One padded row per sequence, nothing shared: for models whose state cannot be forked."""
    sequences = [s for group in groups for s in group]
    fed = [_joined(s)[:-1] for s in sequences]
    width = max(len(s) for s in fed)
    input_ids = np.zeros((len(fed), width), dtype=np.int64)
    mask = np.zeros((len(fed), width), dtype=np.int64)
    rows = []
    targets = []
    for i, (sequence, tokens) in enumerate(zip(sequences, fed, strict=True)):
        input_ids[i, : len(tokens)] = tokens
        mask[i, : len(tokens)] = 1
        scored, counting = _scored(sequence)
        rows.append(i * width + scored)
        targets.append(counting)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        model_kwargs={"attention_mask": torch.from_numpy(mask)},
        scored_rows=_long(rows),
        targets=_long(targets),
        lengths=[len(counting) for counting in targets],
    )


def _scored(sequence: TokenSequence) -> tuple[np.ndarray, IdArray]:
    """The tokens that count, and where in the sequence each one's predecessor stands."""
    prompt, completion, mask = sequence
    before = np.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return (before, completion) if mask is None else (before[mask], completion[mask])


def _joined(sequence: TokenSequence) -> IdArray:
    return np.concatenate([sequence.prompt_ids, sequence.completion_ids])


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without waiting for the device's earlier work."""
    if device.type == "cuda" and value.device.type == "cpu":
        # From pinned memory the copy is queued; otherwise it would wait for all earlier work on the GPU.
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def _starts(lengths: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))


def _long(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
