"""Are the cached log-probs those of this very model? Asked before the first step and by ``verify``.

At step 0 the policy is the reference, so its own log-probs of a sample must equal the cached ones up
to rounding. How much rounding is normal is measured, not assumed: the floor is the same forward with
another batch composition. Margins alone would hide an error that both sides share.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from dpo_opt.optimize.loss import preference_loss
from dpo_opt.optimize.packing import pair_group
from dpo_opt.optimize.policy import Policy
from dpo_opt.schemas.errors import FingerprintError
from dpo_opt.schemas.pairs import LogpArray, ScoredPair

PARITY_PAIRS = 32
_BATCH_ROWS = 2048

# Nats per token. bf16 engines differ by about 0.03 to 0.05 (sd) on the same weights; another model or
# a shifted token by more than 0.5.
_MEAN_LIMIT = 0.01
_SD_LIMIT = 0.1
_P99_LIMIT = 0.3
# With fp32 on both sides only the order of additions differs.
_FP32_LIMIT = 5e-3
_FP32_LOSS_LIMIT = 1e-3


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
    loss: float
    """Mean loss of the sample at step 0 (``sigmoid``, beta 0.1); ln 2 when policy == reference."""
    ok: bool


@torch.no_grad()
def measure_parity(policy: Policy, pairs: Sequence[ScoredPair], *, cached_dtype: str) -> Parity:
    """Compare the cached token log-probs of ``pairs`` with the policy's own.

    Args:
        policy: Loaded from the weights that are claimed to be the reference.
        pairs: The sample.
        cached_dtype: Dtype the reference was scored in, from the fingerprint.
    """
    cached = np.concatenate([_cached(pair) for pair in pairs])
    own = _own(policy, pairs, policy.bins([pair_group(pair) for pair in pairs], _BATCH_ROWS))
    alone = _own(policy, pairs, [[i] for i in range(len(pairs))])
    difference = cached - own
    floor = alone - own
    mean, sd, p99 = _spread(difference)
    _, floor_sd, floor_p99 = _spread(floor)
    largest = float(np.abs(difference).max())
    loss = _loss(pairs, own)

    within = (
        # A mean over few tokens may exceed the limit by chance: three standard errors are allowed.
        abs(mean) <= _MEAN_LIMIT + 3 * sd / np.sqrt(len(cached))
        and sd <= max(2 * floor_sd, _SD_LIMIT)
        and p99 <= max(3 * floor_p99, _P99_LIMIT)
    )
    if cached_dtype == "float32" and policy.dtype == torch.float32:
        within = within and largest <= _FP32_LIMIT and abs(loss - np.log(2)) <= _FP32_LOSS_LIMIT
    return Parity(
        pairs=len(pairs),
        tokens=len(cached),
        mean=mean,
        sd=sd,
        p99=p99,
        max=largest,
        floor_sd=floor_sd,
        floor_p99=floor_p99,
        loss=loss,
        ok=bool(np.isfinite(largest) and within),
    )


def require_parity(parity: Parity, *, shards: str, model: str) -> None:
    """Stop where the cached log-probs are not this model's.

    Raises:
        FingerprintError: The parity is out of bounds.
    """
    if parity.ok:
        return
    raise FingerprintError(
        f"the cached log-probs are not those of {model}: per token mean {parity.mean:+.4f}, "
        f"sd {parity.sd:.4f}, p99 {parity.p99:.4f}, max {parity.max:.4f} nats "
        f"(floor sd {parity.floor_sd:.4f}) over {parity.tokens} tokens; "
        f"loss {parity.loss:.5f}, ln 2 is 0.69315",
        where=shards,
        why="the policy would be pulled towards another model than the one it starts from",
        fix=f"dpo-opt verify --shards {shards} --model {model}, then precompute again; "
        "or pass --reference-differs if another reference is intended",
    )


def _cached(pair: ScoredPair) -> LogpArray:
    return np.concatenate([pair.ref_chosen_token_logps, pair.ref_rejected_token_logps])


def _own(policy: Policy, pairs: Sequence[ScoredPair], bins: Sequence[Sequence[int]]) -> LogpArray:
    found: dict[int, LogpArray] = {}
    for chosen in bins:
        logps = policy.sequence_logps([pair_group(pairs[i]) for i in chosen])
        for position, i in enumerate(chosen):
            sides = logps[2 * position : 2 * position + 2]
            found[i] = torch.cat(sides).cpu().numpy()
    return np.concatenate([found[i] for i in range(len(pairs))])


def _spread(values: LogpArray) -> tuple[float, float, float]:
    """Mean, standard deviation and 99th percentile of the absolute values."""
    wide = values.astype(np.float64)
    return float(wide.mean()), float(wide.std()), float(np.quantile(np.abs(wide), 0.99))


def _loss(pairs: Sequence[ScoredPair], own: LogpArray) -> float:
    sums, start = [], 0
    for pair in pairs:
        middle = start + len(pair.chosen_ids)
        end = middle + len(pair.rejected_ids)
        sums.append((own[start:middle].sum(dtype=np.float64), own[middle:end].sum(dtype=np.float64)))
        start = end
    chosen, rejected = torch.tensor(sums, dtype=torch.float64).unbind(1)
    result = preference_loss(
        loss_type="sigmoid",
        chosen_logps=chosen,
        rejected_logps=rejected,
        ref_chosen_logps=torch.tensor([p.ref_chosen_logps for p in pairs], dtype=torch.float64),
        ref_rejected_logps=torch.tensor([p.ref_rejected_logps for p in pairs], dtype=torch.float64),
    )
    return float(result.losses.mean())
