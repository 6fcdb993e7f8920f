"""Whether a run does better on the pairs that it was trained on than on pairs that it has not seen."""

from collections.abc import Mapping
from typing import NamedTuple

import polars as pl

from dpo_opt.analysis.outcomes import Outcome


class Overfitting(NamedTuple):
    """What speaks for it: at least one of the two is given."""

    training_accuracy: float | None
    """Reward accuracy of the training pairs, where it is above the interval of the held-out pairs."""
    lowest: tuple[int, float] | None
    """Step and value of the lowest held-out loss, where the last one is higher by a tenth or more."""


def overfitting(splits: Mapping[str, Outcome], evals: pl.DataFrame) -> Overfitting | None:
    """What speaks for overfitting, or None.

    Args:
        splits: Outcomes of ``training`` and ``held-out`` pairs, where they are known.
        evals: ``step`` and ``eval_loss`` of every evaluation.
    """
    accuracy = lowest = None
    if "training" in splits and "held-out" in splits:
        trained, bound = splits["training"].reward_accuracy.value, splits["held-out"].reward_accuracy.high
        accuracy = trained if trained > bound else None
    if "eval_loss" in evals.columns and len(losses := evals.drop_nulls("eval_loss")):
        step, least = losses.sort("eval_loss", "step").select("step", "eval_loss").row(0)
        last = losses["eval_loss"][-1]
        lowest = (step, least) if last > least + abs(least) / 10 else None
    return Overfitting(accuracy, lowest) if accuracy is not None or lowest is not None else None
