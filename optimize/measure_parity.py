"""Measures parity: compares a sample's cached log-probs with the policy's own, in batches and one by one."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dpo_opt.optimize.adapters.lora_targets import has_experts
from dpo_opt.optimize.forward.packing import Group, packed_size, pair_group
from dpo_opt.optimize.forward.policy import Policy, one_by_one
from dpo_opt.optimize.losses.pair_inputs import LossInputs
from dpo_opt.optimize.losses.preference_loss import preference_loss
from dpo_opt.optimize.parity import Parity
from dpo_opt.schemas.pairs import LogpArray, ScoredPair, counted
from dpo_opt.schemas.shard_folder import ShardFolder

PARITY_PAIRS = 32
ALONE_PAIRS = 8
"""How many of these are also scored one sequence at a time before training, which takes longest."""
_BATCH_ROWS = 2048


@torch.no_grad()
def measure_parity(
    policy: Policy, pairs: Sequence[ScoredPair], *, cached_dtype: str, alone: int | None = None
) -> Parity:
    """Compare the cached token log-probs of ``pairs`` with the policy's own.

    Args:
        policy: Loaded from the weights that are claimed to be the reference.
        pairs: The sample.
        cached_dtype: Dtype that the reference was scored in, from the fingerprint.
        alone: How many of the pairs, evenly spread, are also scored one sequence at a time; None: all.
    """
    groups = [pair_group(pair) for pair in pairs]
    # Two of the longest pairs fit, so that every pair can share a forward: otherwise there is no floor.
    budget = max(_BATCH_ROWS, 2 * max(packed_size(group) for group in groups))
    sides = [
        counted(logps, mask)
        for pair in pairs
        for logps, mask in (
            (pair.ref_chosen_token_logps, pair.chosen_mask),
            (pair.ref_rejected_token_logps, pair.rejected_mask),
        )
    ]
    own_sides = _together(policy, groups, budget)
    chosen_pairs = _evenly(len(pairs), min(alone or len(pairs), len(pairs)))
    # Numbers of the sides that are also scored alone.
    numbers = [2 * int(pair) + side for pair in chosen_pairs for side in (0, 1)]
    alone_sides = _alone(policy, [groups[pair] for pair in chosen_pairs])
    beside = [own_sides[number] for number in numbers]
    cached, own = np.concatenate(sides), np.concatenate(own_sides)
    mean, sd, p99, largest = _spread(cached - own)
    alone_mean, alone_sd, alone_p99, alone_max = _spread(
        np.concatenate([sides[number] for number in numbers]) - np.concatenate(alone_sides)
    )
    floor_mean, floor_sd, floor_p99, floor_max = _spread(np.concatenate(alone_sides) - np.concatenate(beside))
    margins = _margins(sides) - _margins(own_sides)
    worst = max(
        (
            _worst(sides[n], other, n)
            for n, other in [*enumerate(own_sides), *zip(numbers, alone_sides, strict=True)]
        ),
        key=lambda found: found.size,
    )
    parity = Parity(
        pairs=len(pairs),
        tokens=len(cached),
        mean=mean,
        sd=sd,
        p99=p99,
        max=largest,
        correlation=_correlation(cached, own),
        margin_mean=float(margins.mean()),
        margin_sd=float(margins.std()),
        loss=_loss(pairs, own_sides),
        worst_row=pairs[worst.side // 2].row,
        worst_side=("chosen", "rejected")[worst.side % 2],
        worst_token=_place(pairs[worst.side // 2], worst),
        worst_cached=worst.cached,
        worst_own=worst.own,
        dtype=str(policy.dtype).removeprefix("torch."),
        cached_dtype=cached_dtype,
        ok=False,
        floor_sd=floor_sd,
        floor_p99=floor_p99,
        floor_max=floor_max,
        floor_margin_sd=float((_margins(alone_sides) - _margins(beside)).std()),
        floor_mean=floor_mean,
        alone_tokens=sum(map(len, alone_sides)),
        alone_mean=alone_mean,
        alone_sd=alone_sd,
        alone_p99=alone_p99,
        alone_max=alone_max,
        experts=has_experts(policy.model),
    )
    return parity._replace(ok=all(check.ok for check in parity.checks))


class _Worst(NamedTuple):
    """The token of one side that is furthest from the cache."""

    size: float
    side: int
    token: int
    cached: float
    own: float


def _worst(cached: LogpArray, own: LogpArray, side: int) -> _Worst:
    # NaN is the worst there can be.
    size = np.nan_to_num(np.abs(cached - own), nan=np.inf)
    token = int(size.argmax())
    return _Worst(float(size[token]), side, token, float(cached[token]), float(own[token]))


def _place(pair: ScoredPair, worst: _Worst) -> int:
    """Where in its completion the token stands, among those that do not count too."""
    mask = (pair.chosen_mask, pair.rejected_mask)[worst.side % 2]
    return worst.token if mask is None else int(np.flatnonzero(mask)[worst.token])


def spread_pairs(folder: ShardFolder, count: int) -> list[ScoredPair]:
    """At most ``count`` pairs, the same each time, from every shard if ``count`` allows.

    Raises:
        DataError: A file that is needed is damaged.
    """
    names = ("shard", "row_group", "row")
    index = folder.index(names)
    shards, groups, rows = (index[name].to_numpy() for name in names)
    pairs: list[ScoredPair] = []
    wanted: dict[tuple[int, int], set[int]] = {}
    for position in spread_positions(shards, count):
        wanted.setdefault((int(shards[position]), int(groups[position])), set()).add(int(rows[position]))
    for (shard, group), numbers in wanted.items():
        (found,) = folder.row_groups(shard, row_groups=[group])
        pairs += [pair for pair in found if pair.row in numbers]
    return pairs


def spread_positions(shards: npt.NDArray[np.int32], count: int) -> npt.NDArray[np.int64]:
    """Positions in the index, in order: equally many from each shard, or all that it has.

    Args:
        shards: (n,) shard of each pair, ascending.
        count: Positions wanted.
    """
    _, starts, sizes = np.unique(shards, return_index=True, return_counts=True)
    quotas = np.minimum(sizes, count // len(sizes))
    while left := min(count, len(shards)) - int(quotas.sum()):
        open_ = np.flatnonzero(quotas < sizes)
        quotas[open_[_evenly(len(open_), min(left, len(open_)))]] += 1
    return np.concatenate([a + _evenly(n, q) for a, n, q in zip(starts, sizes, quotas, strict=True)])


def _evenly(size: int, count: int) -> npt.NDArray[np.int64]:
    """``count`` different numbers below ``size``, evenly spread."""
    return ((np.arange(count) + 0.5) * size / max(count, 1)).astype(np.int64)


def _together(policy: Policy, groups: Sequence[Group], budget: int) -> list[LogpArray]:
    """Chosen and rejected of every pair, in order, computed as training does."""
    found: dict[int, LogpArray] = {}
    for members in policy.bins(groups, budget):
        logps = policy.sequence_logps([groups[i] for i in members])
        for position, i in enumerate(members):
            for side in (0, 1):
                found[2 * i + side] = logps[2 * position + side].cpu().numpy()
    return [found[i] for i in range(2 * len(groups))]


def _alone(policy: Policy, groups: Sequence[Group]) -> list[LogpArray]:
    """Chosen and rejected of every pair, in order, each in a forward of its own."""
    with one_by_one(policy) as logps:
        return [logps(sequence).cpu().numpy() for group in groups for sequence in group]


def _spread(values: LogpArray) -> tuple[float, float, float, float]:
    """Mean, standard deviation, 99th percentile and largest of the absolute values."""
    wide = values.astype(np.float64)
    size = np.abs(wide)
    return float(wide.mean()), float(wide.std()), float(np.quantile(size, 0.99)), float(size.max())


def _correlation(a: LogpArray, b: LogpArray) -> float | None:
    wide = np.stack([a, b]).astype(np.float64)
    if not (np.isfinite(wide).all() and (wide.std(axis=1) > 0).all()):
        return None
    return float(np.corrcoef(wide)[0, 1])


def _sums(sides: Sequence[LogpArray]) -> npt.NDArray[np.float64]:
    """(pairs, 2): chosen, rejected."""
    return np.array([side.sum(dtype=np.float64) for side in sides]).reshape(-1, 2)


def _margins(sides: Sequence[LogpArray]) -> npt.NDArray[np.float64]:
    sums = _sums(sides)
    return sums[:, 0] - sums[:, 1]


def _loss(pairs: Sequence[ScoredPair], own: Sequence[LogpArray]) -> float:
    chosen, rejected = torch.from_numpy(_sums(own)).unbind(1)
    lengths = torch.tensor([[p.chosen_counted, p.rejected_counted] for p in pairs])
    inputs = LossInputs(
        chosen_logps=chosen,
        rejected_logps=rejected,
        ref_chosen_logps=torch.tensor([p.ref_chosen_logps for p in pairs], dtype=torch.float64),
        ref_rejected_logps=torch.tensor([p.ref_rejected_logps for p in pairs], dtype=torch.float64),
        chosen_lengths=lengths[:, 0],
        rejected_lengths=lengths[:, 1],
        beta=0.1,
    )
    return float(preference_loss("sigmoid", inputs).losses.mean())
