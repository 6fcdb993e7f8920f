"""Pairs of which some tokens are context: they count in no sum, loss or length."""

import numpy as np

from dpo_opt.schemas.pairs import ScoredPair


def masked_pairs(count: int = 9) -> list[ScoredPair]:
    """Pairs with a shared beginning; of some, one side or both have context inside."""
    rng = np.random.default_rng(3)

    def ids(low: int, high: int) -> np.ndarray:
        return rng.integers(5, 90, rng.integers(low, high)).astype(np.int32)

    def mask(length: int) -> np.ndarray:
        found = rng.random(length) < 0.5
        found[-1] = True
        return found

    pairs = []
    for row in range(count):
        shared = ids(1, 4)
        chosen, rejected = (np.concatenate([shared, ids(4, 12)]) for _ in range(2))
        pairs.append(
            ScoredPair(
                row=row,
                source=None,
                prompt_ids=ids(2, 9),
                chosen_ids=chosen,
                rejected_ids=rejected,
                chosen_mask=mask(len(chosen)) if row % 3 else None,
                rejected_mask=mask(len(rejected)) if row % 3 == 2 else None,
                ref_chosen_token_logps=-rng.exponential(2, len(chosen)).astype(np.float32),
                ref_rejected_token_logps=-rng.exponential(2, len(rejected)).astype(np.float32),
            )
        )
    return pairs


def sides_of(pair: ScoredPair) -> list[tuple[np.ndarray, np.ndarray | None, np.ndarray]]:
    return [
        (pair.chosen_ids, pair.chosen_mask, pair.ref_chosen_token_logps),
        (pair.rejected_ids, pair.rejected_mask, pair.ref_rejected_token_logps),
    ]
