"""Compares runs on the pairs that they have in common: differences pair by pair, with their intervals.

Two runs may have intervals that overlap and still differ for certain, because the same pairs are hard for
both (paired differences, Miller, arXiv 2411.00640).
"""

from typing import NamedTuple

import polars as pl

from dpo_opt.analysis import rewards
from dpo_opt.analysis.intervals import Interval
from dpo_opt.analysis.outcomes import means_over_prompts


class Difference(NamedTuple):
    """One run minus another on the same pairs; intervals are over prompts."""

    pairs: int
    prompts: int
    held_out: bool
    """Whether neither run was trained on any of these pairs."""
    reward_accuracy: Interval
    ranking_accuracy: Interval
    chosen_fell: Interval


def difference(own: pl.LazyFrame, baseline: pl.LazyFrame) -> Difference | None:
    """How a run differs from another one; None if they have no pair in common.

    Pairs that were held out of both are compared where there are any, or else all that both have.

    Args:
        own: The run's final pairs, from ``final_pairs``.
        baseline: Those of the other run.
    """
    pairs = _shared(own, baseline)
    unseen = pairs.filter("held_out", "held_out_baseline")
    held_out = len(unseen) > 0
    pairs = unseen if held_out else pairs
    if not len(pairs):
        return None
    names = ("reward_accuracy", "ranking_accuracy", "chosen_fell")
    gains = (pl.col(name).cast(pl.Int8) - pl.col(f"{name}_baseline").cast(pl.Int8) for name in names)
    return Difference(
        pairs=len(pairs),
        prompts=pairs["prompt"].n_unique(),
        held_out=held_out,
        **dict(zip(names, means_over_prompts(pairs, *gains), strict=True)),
    )


def _shared(own: pl.LazyFrame, baseline: pl.LazyFrame) -> pl.DataFrame:
    # By row and reference: the same row of other shards has other log-probs.
    keys = ["row", "ref_chosen_logps", "ref_rejected_logps"]
    values = {
        "reward_accuracy": rewards.accuracy(),
        "ranking_accuracy": rewards.ranking_accuracy(),
        "chosen_fell": rewards.chosen_fell(),
    }
    left = own.select(*keys, "prompt", "held_out", **values)
    right = baseline.select(*keys, "held_out", **values)
    return left.join(right, on=keys, suffix="_baseline").collect(engine="streaming")
