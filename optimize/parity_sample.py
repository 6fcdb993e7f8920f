"""Which pairs are compared with the policy's own log-probs: some of every shard, the same each time."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dpo_opt.schemas.arrow_numbers import numbers
from dpo_opt.schemas.pairs import MaskArray, ScoredPair
from dpo_opt.schemas.shard_folder import ShardFolder

_PLACE = ("shard", "row_group", "row")
_MOST_PAIRS = 32
_LEAST_TOKENS = 768
"""Of fewer, the 99th percentile is about the largest value, which half precision makes large by chance."""
_MOST_TOKENS = 2048
"""Of the pairs beyond the first step's, so that long completions do not make the start long."""


def spread_pairs(folder: ShardFolder, count: int) -> list[ScoredPair]:
    """At most ``count`` pairs, the same each time, from every shard if ``count`` allows.

    Raises:
        DataError: A file that is needed is damaged.
    """
    index = folder.index(_PLACE)
    return _pairs_at(folder, index, spread_positions(numbers(index["shard"]), count))


def pairs_beside(folder: ShardFolder, step: Sequence[ScoredPair]) -> list[ScoredPair]:
    """Pairs that show what a step's pairs do not.

    One of each shard that gives the step less than one pair in 32: among the others it would be lost. More
    of all shards, if all these pairs together have few scored tokens.

    Args:
        folder: The shards.
        step: The pairs of a step.

    Returns:
        Pairs that the step does not have. Long completions are cut after their first tokens.

    Raises:
        DataError: A file that is needed is damaged.
    """
    index = folder.index([*_PLACE, "chosen_length", "rejected_length"])
    shards = numbers(index["shard"])
    tokens = numbers(index["chosen_length"]) + numbers(index["rejected_length"])
    others = ~np.isin(numbers(index["row"]), [pair.row for pair in step])
    shown = _MOST_PAIRS * np.bincount(shards[~others], minlength=shards.max() + 1) >= max(1, len(step))
    hidden = np.flatnonzero(others & ~shown[shards])
    taken = hidden[spread_positions(shards[hidden], min(_MOST_PAIRS, len(np.unique(shards[hidden]))))]
    missing = _LEAST_TOKENS - int(tokens[~others].sum() + tokens[taken].sum())
    if missing > 0:
        others[taken] = False
        more = np.flatnonzero(others)
        count = min(_MOST_PAIRS - len(taken), math.ceil(missing / tokens.mean()))
        taken = np.union1d(taken, more[spread_positions(shards[more], count)])
    return _cut(_pairs_at(folder, index, taken))


def head_to_judge(pairs: Sequence[ScoredPair], beside: int) -> int:
    """How many of the first pairs are judged by themselves: the ``beside`` pairs that come before a step's.

    Among many of the step's they would be lost; they are joined by as many as give enough scored tokens.
    """
    tokens = np.cumsum([pair.chosen_counted + pair.rejected_counted for pair in pairs])
    return min(len(pairs), max(beside, int(np.searchsorted(tokens, _LEAST_TOKENS)) + 1))


def spread_positions(shards: npt.NDArray[np.int32], count: int) -> npt.NDArray[np.int64]:
    """Positions in the index, in order: equally many from each shard, or all that it has.

    Args:
        shards: (n,) shard of each pair, ascending.
        count: Positions wanted.
    """
    if not len(shards):
        return np.empty(0, dtype=np.int64)
    _, starts, sizes = np.unique(shards, return_index=True, return_counts=True)
    quotas = np.minimum(sizes, count // len(sizes))
    while left := min(count, len(shards)) - int(quotas.sum()):
        open_ = np.flatnonzero(quotas < sizes)
        quotas[open_[evenly(len(open_), min(left, len(open_)))]] += 1
    return np.concatenate([a + evenly(n, q) for a, n, q in zip(starts, sizes, quotas, strict=True)])


def evenly(size: int, count: int) -> npt.NDArray[np.int64]:
    """``count`` different numbers below ``size``, evenly spread."""
    return ((np.arange(count) + 0.5) * size / max(count, 1)).astype(np.int64)


def _pairs_at(folder: ShardFolder, index: pa.Table, positions: npt.NDArray[np.int64]) -> list[ScoredPair]:
    shards, groups, rows = (numbers(index[name]) for name in _PLACE)
    pairs: list[ScoredPair] = []
    wanted: dict[tuple[int, int], set[int]] = {}
    for position in positions:
        wanted.setdefault((int(shards[position]), int(groups[position])), set()).add(int(rows[position]))
    for (shard, group), chosen in wanted.items():
        (found,) = folder.row_groups(shard, row_groups=[group])
        pairs += [pair for pair in found if pair.row in chosen]
    return pairs


def _cut(pairs: Sequence[ScoredPair]) -> list[ScoredPair]:
    """The pairs, with their completions cut if they have too many tokens that count; the first ones stay."""
    if sum(pair.chosen_counted + pair.rejected_counted for pair in pairs) <= _MOST_TOKENS:
        return list(pairs)
    most = _MOST_TOKENS // (2 * len(pairs))
    return [
        pair.cut(chosen=_stop(pair.chosen_mask, most), rejected=_stop(pair.rejected_mask, most))
        for pair in pairs
    ]


def _stop(mask: MaskArray | None, most: int) -> int:
    """Where a completion is cut, so that at most ``most`` of its tokens count."""
    if mask is None:
        return most
    counting = np.flatnonzero(mask)[:most]
    return int(counting[-1]) + 1
