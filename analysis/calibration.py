"""Whether sigma(margin) is the probability that it stands for, as DPO's model of preferences says.

Under that model (Rafailov et al. 2023, arXiv 2305.18290, eq. 1) a policy with reward margin m says that the
chosen completion is preferred with probability sigma(m). Of the pairs about which it is sure to the same
degree, that share should be ranked as their label says.
"""

from typing import NamedTuple

import numpy as np
import polars as pl

from dpo_opt.analysis import rewards
from dpo_opt.analysis.binned import bin_of, drawn, equal_groups, finite
from dpo_opt.analysis.intervals import Interval
from dpo_opt.analysis.outcomes import shares_over_prompts

_GROUPS = 10


class CalibrationGroup(NamedTuple):
    """Pairs about which the policy is sure to about the same degree."""

    pairs: int
    confidence: float
    """Mean of sigma(|margin|), from 0.5 to 1."""
    accuracy: Interval
    """Share of the pairs with a margin above 0, over prompts."""


class Calibration(NamedTuple):
    """How far sigma(|margin|) is from the share of pairs that the policy gets right."""

    groups: list[CalibrationGroup]
    """Of about equal size, least sure first."""
    expected_error: float
    """Expected calibration error: mean over pairs of |accuracy - confidence| of their group (Guo et al. 2017,
    arXiv 1706.04599, eq. 3)."""
    confidence: float
    """Mean of sigma(|margin|) over all pairs."""
    accuracy: float
    log_loss: float
    """Mean of -log sigma(margin), in nats: log 2 for a policy that knows nothing."""


def calibration(pairs: pl.LazyFrame, *, beta: float) -> Calibration | None:
    """Reliability of the implicit reward's probabilities; None without pairs.

    Args:
        pairs: From ``final_pairs``, best of prompts that training has not seen.
        beta: The run's beta.
    """
    margin = rewards.margin(beta=beta)
    pairs = pairs.filter(margin.is_finite())
    size = margin.abs()
    edges = equal_groups(finite(drawn(pairs, size.alias("size"))["size"]), _GROUPS)
    group = bin_of(size, edges)
    table = (
        pairs.group_by(group.alias("group"))
        .agg(
            pl.len().alias("pairs"),
            (1 / (1 + (-size).exp())).mean().alias("confidence"),
            rewards.accuracy().mean().alias("accuracy"),
            rewards.sigmoid_loss(beta=beta).mean().alias("loss"),
        )
        .sort("group")
        .collect(engine="streaming")
    )
    if not len(table):
        return None
    groups = []
    for number, count, confidence in table.select("group", "pairs", "confidence").iter_rows():
        _, (accuracy,) = shares_over_prompts(pairs.filter(group == number), rewards.accuracy())
        groups.append(CalibrationGroup(count, confidence, accuracy))
    weights = table["pairs"].to_numpy() / table["pairs"].sum()
    right, sure = table["accuracy"].to_numpy(), table["confidence"].to_numpy()
    return Calibration(
        groups=groups,
        expected_error=float(weights @ np.abs(right - sure)),
        confidence=float(weights @ sure),
        accuracy=float(weights @ right),
        log_loss=float(weights @ table["loss"].to_numpy()),
    )
