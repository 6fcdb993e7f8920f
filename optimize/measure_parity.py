"""Measures parity: compares a sample's cached log-probs with the policy's own, in batches and one by one."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dpo_opt.optimize.adapters.lora_targets import has_experts
from dpo_opt.optimize.forward.packing import packed_size, pair_group
from dpo_opt.optimize.forward.policy import Policy, one_by_one
from dpo_opt.optimize.losses.pair_inputs import LossInputs
from dpo_opt.optimize.losses.preference_loss import preference_loss
from dpo_opt.optimize.parity import Parity
from dpo_opt.optimize.parity_sample import evenly
from dpo_opt.schemas.pairs import LogpArray, ScoredPair, counted

_BATCH_ROWS = 2048


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
    some = evenly(len(pairs), min(alone or len(pairs), len(pairs)))
    own = OwnLogps(list(pairs), together(policy, pairs), one_at_a_time(policy, pairs, some))
    return compare(policy, own, cached_dtype=cached_dtype)


class OwnLogps(NamedTuple):
    """Pairs, which hold the cached log-probs, and the policy's own of the tokens that count.

    A side's number is twice its pair's place, and one more for rejected.
    """

    pairs: list[ScoredPair]
    sides: list[LogpArray]
    """Of every side, computed as training does."""
    alone: Mapping[int, LogpArray]
    """Of some sides, by their numbers, each computed in a forward of its own."""


def compare(policy: Policy, own: OwnLogps, *, cached_dtype: str, first: int | None = None) -> Parity:
    """Compare cached log-probs with the policy's own that were computed before.

    Args:
        policy: The policy that computed them.
        own: What it computed.
        cached_dtype: Dtype that the reference was scored in, from the fingerprint.
        first: How many of the pairs are compared as training computes them; None: all. All that was computed
            alone is compared.
    """
    sides = [
        counted(logps, mask)
        for pair in own.pairs
        for logps, mask in (
            (pair.ref_chosen_token_logps, pair.chosen_mask),
            (pair.ref_rejected_token_logps, pair.rejected_mask),
        )
    ]
    pairs = own.pairs[:first]
    some = 2 * len(pairs)
    own_sides = own.sides[:some]
    alone_sides = list(own.alone.values())
    beside = [own.sides[number] for number in own.alone]
    cached, found = np.concatenate(sides[:some]), np.concatenate(own_sides)
    mean, sd, p99, largest = _spread(cached - found)
    alone_mean, alone_sd, alone_p99, alone_max = _spread(
        np.concatenate([sides[number] for number in own.alone]) - np.concatenate(alone_sides)
    )
    floor_mean, floor_sd, floor_p99, floor_max = _spread(np.concatenate(alone_sides) - np.concatenate(beside))
    margins = _margins(sides[:some]) - _margins(own_sides)
    worst = max(
        (_worst(sides[n], other, n) for n, other in [*enumerate(own_sides), *own.alone.items()]),
        key=lambda found: found.size,
    )
    parity = Parity(
        pairs=len(pairs),
        tokens=len(cached),
        mean=mean,
        sd=sd,
        p99=p99,
        max=largest,
        correlation=_correlation(cached, found),
        margin_mean=float(margins.mean()),
        margin_sd=float(margins.std()),
        loss=_loss(pairs, own_sides),
        worst_row=own.pairs[worst.side // 2].row,
        worst_side=("chosen", "rejected")[worst.side % 2],
        worst_token=_place(own.pairs[worst.side // 2], worst),
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


@torch.no_grad()
def together(policy: Policy, pairs: Sequence[ScoredPair]) -> list[LogpArray]:
    """Chosen and rejected of every pair, in order, computed as training does."""
    groups = [pair_group(pair) for pair in pairs]
    # Two of the longest pairs fit, so that every pair can share a forward: otherwise there is no floor.
    budget = max(_BATCH_ROWS, 2 * max(map(packed_size, groups), default=0))
    found: dict[int, LogpArray] = {}
    for members in policy.bins(groups, budget):
        logps = policy.sequence_logps([groups[i] for i in members])
        for position, i in enumerate(members):
            for side in (0, 1):
                found[2 * i + side] = logps[2 * position + side].cpu().numpy()
    return [found[i] for i in range(2 * len(groups))]


@torch.no_grad()
def one_at_a_time(policy: Policy, pairs: Sequence[ScoredPair], places: Iterable[int]) -> dict[int, LogpArray]:
    """Both sides of the pairs at these places, by their numbers, each computed in a forward of its own."""
    with one_by_one(policy) as logps:
        return {
            2 * int(place) + side: logps(sequence).cpu().numpy()
            for place in places
            for side, sequence in enumerate(pair_group(pairs[place]))
        }


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
