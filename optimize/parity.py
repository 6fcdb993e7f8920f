"""Are the cached log-probs those of this very model? Asked before the first step and by ``verify``.

At step 0 the policy is the reference, so its own log-probs of a sample must equal the cached ones up
to rounding. How much rounding is normal is measured, not assumed: the floor is the same forward with
another batch composition. Margins alone would hide an error that both sides share.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dpo_opt.optimize.loss import preference_loss
from dpo_opt.optimize.packing import Group, packed_size, pair_group
from dpo_opt.optimize.policy import Policy
from dpo_opt.schemas.errors import FingerprintError
from dpo_opt.schemas.manifest import ShardFolder
from dpo_opt.schemas.pairs import LogpArray, ScoredPair

PARITY_PAIRS = 32
_BATCH_ROWS = 2048


class _Limits(NamedTuple):
    """In nats per token; each but the mean's is raised to a multiple of the measured floor."""

    mean: float
    sd: float
    p99: float
    max: float
    loss: float | None
    """Of the distance from ln 2, where it says more than the others."""


# bf16 engines differ by 0.03 to 0.05 (sd) on the same weights, single tokens by up to 0.7; another model or a
# shifted token by more than 0.5 on average, and by many nats at its worst token.
_HALF = _Limits(mean=0.01, sd=0.1, p99=0.3, max=3.0, loss=None)
# With fp32 on both sides only the order of additions differs: at most 5e-5 measured on a CPU, an sd of up to
# 2.2e-3 reported on GPUs.
_FP32 = _Limits(mean=1e-3, sd=2.5e-3, p99=5e-3, max=5e-3, loss=1e-3)

_USUAL_CAUSES = {
    "mean": "every token is shifted: other weights, another dtype, or a temperature",
    "sd": "noise beyond rounding: a lower precision or a quantization that the fingerprint does not say, or "
    "other weights",
    "p99": "one token in a hundred is far off: some rows were scored with other tokens in view (cut, padded "
    "or packed wrongly)",
    "max": "a single token is far off: one damaged or wrongly scored row",
    "loss": "margins differ although single tokens hardly do: small differences that add up in one direction",
}


class Check(NamedTuple):
    """One threshold."""

    name: str
    value: float
    limit: float
    ok: bool
    usual_cause: str
    """What it usually means if this one fails."""


class Parity(NamedTuple):
    """Cached minus own token log-probs, in nats per token, next to the floor."""

    pairs: int
    tokens: int
    mean: float
    sd: float
    p99: float
    """99th percentile of the absolute difference."""
    max: float
    floor_sd: float
    floor_p99: float
    floor_max: float
    correlation: float | None
    """Of cached and own values. Not judged: it follows from ``sd`` and the spread of the values, and is low
    for completions that the model is sure of. None where all values are equal."""
    margin_mean: float
    """Of cached minus own (chosen minus rejected), summed over tokens: nats per pair."""
    margin_sd: float
    """The same: times beta it is the noise that the cache adds to the loss's logit."""
    floor_margin_sd: float
    loss: float
    """Mean loss of the sample at step 0 (``sigmoid``, beta 0.1); ln 2 when policy == reference."""
    mean_limit: float
    sd_limit: float
    p99_limit: float
    max_limit: float
    loss_limit: float | None
    """None unless both sides are fp32."""
    worst_row: int
    """Source row of the token that differs most."""
    worst_side: str
    worst_token: int
    """Its position in the completion, from 0."""
    worst_cached: float
    worst_own: float
    dtype: str
    """Compute dtype of the own values."""
    cached_dtype: str
    ok: bool

    @property
    def checks(self) -> list[Check]:
        """Every threshold that was applied."""
        limits = {
            "mean": (abs(self.mean), self.mean_limit),
            "sd": (self.sd, self.sd_limit),
            "p99": (self.p99, self.p99_limit),
            "max": (self.max, self.max_limit),
        }
        if self.loss_limit is not None:
            limits["loss"] = (abs(self.loss - float(np.log(2))), self.loss_limit)
        return [
            Check(name, value, limit, bool(np.isfinite(value) and value <= limit), _USUAL_CAUSES[name])
            for name, (value, limit) in limits.items()
        ]


@torch.no_grad()
def measure_parity(policy: Policy, pairs: Sequence[ScoredPair], *, cached_dtype: str) -> Parity:
    """Compare the cached token log-probs of ``pairs`` with the policy's own.

    Args:
        policy: Loaded from the weights that are claimed to be the reference.
        pairs: The sample.
        cached_dtype: Dtype the reference was scored in, from the fingerprint.
    """
    groups = [pair_group(pair) for pair in pairs]
    # Two of the longest fit, so that each pair can share its forward: else there would be no floor.
    budget = max(_BATCH_ROWS, 2 * max(packed_size(group) for group in groups))
    sides = [side for pair in pairs for side in (pair.ref_chosen_token_logps, pair.ref_rejected_token_logps)]
    own_sides = _own(policy, groups, policy.bins(groups, budget))
    alone_sides = _own(policy, groups, [[i] for i in range(len(pairs))])
    cached, own = np.concatenate(sides), np.concatenate(own_sides)
    difference = cached - own
    mean, sd, p99 = _spread(difference)
    floor = np.concatenate(alone_sides) - own
    _, floor_sd, floor_p99 = _spread(floor)
    floor_max = float(np.abs(floor).max())
    margins = _margins(sides) - _margins(own_sides)
    # NaN is the worst there can be.
    size = np.nan_to_num(np.abs(difference), nan=np.inf)
    place = int(size.argmax())
    ends = np.cumsum([len(side) for side in sides])
    side = int(np.searchsorted(ends, place, side="right"))

    dtype = str(policy.dtype).removeprefix("torch.")
    limits = _FP32 if dtype == cached_dtype == "float32" else _HALF
    parity = Parity(
        pairs=len(pairs),
        tokens=len(cached),
        mean=mean,
        sd=sd,
        p99=p99,
        max=float(np.abs(difference).max()),
        floor_sd=floor_sd,
        floor_p99=floor_p99,
        floor_max=floor_max,
        correlation=_correlation(cached, own),
        margin_mean=float(margins.mean()),
        margin_sd=float(margins.std()),
        floor_margin_sd=float((_margins(alone_sides) - _margins(own_sides)).std()),
        loss=_loss(pairs, own_sides),
        # A mean over few tokens may exceed the limit by chance: three standard errors are allowed.
        mean_limit=limits.mean + 3 * sd / len(cached) ** 0.5,
        sd_limit=max(2 * floor_sd, limits.sd),
        p99_limit=max(3 * floor_p99, limits.p99),
        max_limit=max(3 * floor_max, limits.max),
        loss_limit=limits.loss,
        worst_row=pairs[side // 2].row,
        worst_side=("chosen", "rejected")[side % 2],
        worst_token=place - int(ends[side]) + len(sides[side]),
        worst_cached=float(cached[place]),
        worst_own=float(own[place]),
        dtype=dtype,
        cached_dtype=cached_dtype,
        ok=False,
    )
    return parity._replace(ok=all(check.ok for check in parity.checks))


def require_parity(parity: Parity, *, shards: str, model: str) -> None:
    """Stop where the cached log-probs are not this model's.

    Raises:
        FingerprintError: The parity is out of bounds; the message names each threshold that failed.
    """
    if parity.ok:
        return
    failed = [check for check in parity.checks if not check.ok]
    reasons = "".join(f"\n    {c.name} {c.value:.4g} > {c.limit:.4g}: {c.usual_cause}" for c in failed)
    raise FingerprintError(
        f"the cached log-probs are not those of {model}: per token mean {parity.mean:+.4f}, "
        f"sd {parity.sd:.4f}, p99 {parity.p99:.4f}, max {parity.max:.4f} nats "
        f"(floor sd {parity.floor_sd:.4f}) over {parity.tokens} tokens; "
        f"loss {parity.loss:.5f}, ln 2 is 0.69315{reasons}\n    {worst_token(parity)}",
        where=shards,
        why="the policy would be pulled towards another model than the one it starts from",
        fix=f"dpo-opt verify --shards {shards} --model {model}, then precompute again; "
        "or pass --reference-differs if another reference is intended",
    )


def worst_token(parity: Parity) -> str:
    """Where the largest difference is."""
    return (
        f"largest difference: row {parity.worst_row}, {parity.worst_side}, token {parity.worst_token}: "
        f"cached {parity.worst_cached:.4f}, own {parity.worst_own:.4f}"
    )


def spread_pairs(folder: ShardFolder, count: int) -> list[ScoredPair]:
    """At most ``count`` pairs, the same each time, from every shard where ``count`` allows.

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
    for (shard, group), chosen in wanted.items():
        (found,) = folder.row_groups(shard, row_groups=[group])
        pairs += [pair for pair in found if pair.row in chosen]
    return pairs


def spread_positions(shards: npt.NDArray[np.int32], count: int) -> npt.NDArray[np.int64]:
    """Positions in the index, in order: as many from each shard, or all that it has.

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


def _own(policy: Policy, groups: Sequence[Group], bins: Sequence[Sequence[int]]) -> list[LogpArray]:
    """Chosen and rejected of every pair, in order."""
    found: dict[int, LogpArray] = {}
    for chosen in bins:
        logps = policy.sequence_logps([groups[i] for i in chosen])
        for position, i in enumerate(chosen):
            for side in (0, 1):
                found[2 * i + side] = logps[2 * position + side].cpu().numpy()
    return [found[i] for i in range(2 * len(groups))]


def _spread(values: LogpArray) -> tuple[float, float, float]:
    """Mean, standard deviation and 99th percentile of the absolute values."""
    wide = values.astype(np.float64)
    return float(wide.mean()), float(wide.std()), float(np.quantile(np.abs(wide), 0.99))


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
    result = preference_loss(
        loss_type="sigmoid",
        chosen_logps=chosen,
        rejected_logps=rejected,
        ref_chosen_logps=torch.tensor([p.ref_chosen_logps for p in pairs], dtype=torch.float64),
        ref_rejected_logps=torch.tensor([p.ref_rejected_logps for p in pairs], dtype=torch.float64),
    )
    return float(result.losses.mean())
