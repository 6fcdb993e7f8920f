"""95% confidence intervals for values that share prompts: of a mean or a ratio, and of a share.

Pairs or samples of one prompt are correlated, so an interval from single ones is too narrow (Miller,
arXiv 2411.00640). Here a prompt is one observation, a cluster, however many pairs it has. No interval draws
random numbers: the same pairs always give the same one. A percentile bootstrap over prompts was used before;
of 20 to 50 prompts its 95% intervals held the truth 91 to 93 times in 100.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_Z = 1.959963984540054


class Interval(NamedTuple):
    """An estimate with its 95% interval; the bounds are NaN if there is only one cluster."""

    value: float
    low: float
    high: float

    def as_record(self) -> dict[str, float | None]:
        """As JSON has it: what is not a number is null."""
        return {name: value if math.isfinite(value) else None for name, value in self._asdict().items()}


def as_record(estimate: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of an estimate as JSON has them: an interval is an object, and what is not a number is null."""
    return {n: v.as_record() if isinstance(v, Interval) else v for n, v in estimate.items()}


class _Spread(NamedTuple):
    """A ratio of sums over clusters, and how far it varies."""

    ratio: float
    clusters: int
    variance: float
    """Of the ratio, linearized; NaN with fewer than two clusters."""


# U = clusters given


def ratio_interval(
    *, numerators: FloatArray, denominators: FloatArray, multiplicities: IntArray | None = None
) -> Interval:
    """Sum of numerators / sum of denominators, with Student's t around it and clusters as observations.

    For the mean of a value over pairs, a prompt's numerator is the sum of the value over its pairs, and its
    denominator is its number of pairs. The variance is that of the linearized ratio (Cochran 1977, "Sampling
    Techniques", 3rd edition, equation 6.13).

    Args:
        numerators: (U,) One sum per cluster.
        denominators: (U,) One sum per cluster, in the same order.
        multiplicities: (U,) How many equal clusters each entry counts for, 1 by default. Counts of pairs have
            few distinct values, and a million equal clusters then cost as much as one.
    """
    ratio, clusters, variance = _spread(numerators, denominators, multiplicities)
    if math.isnan(variance):
        return Interval(ratio, math.nan, math.nan)
    half = _student_t(clusters - 1) * math.sqrt(variance)
    return Interval(ratio, ratio - half, ratio + half)


def share_interval(
    *, successes: FloatArray, trials: FloatArray, multiplicities: IntArray | None = None
) -> Interval:
    """A proportion over clusters, with Wilson's interval for as many trials as the clusters are worth.

    They are worth the number of independent trials whose share would vary as much as this one does (Kish's
    design effect), less what Student's t takes for few clusters, and never more than there are trials. Where
    all succeed, or none, nothing shows how the pairs of a prompt agree: a cluster is one trial then.

    Args:
        successes: (U,) One count per cluster, at most its trials.
        trials: (U,) One count per cluster, in the same order.
        multiplicities: See :func:`ratio_interval`.
    """
    share, clusters, variance = _spread(successes, trials, multiplicities)
    if share in (0.0, 1.0):
        return wilson(share=share, trials=float(clusters))
    if math.isnan(variance):
        return Interval(share, math.nan, math.nan)
    most = _total(trials, multiplicities)
    worth = most if variance == 0 else min(most, share * (1 - share) / variance)
    return wilson(share=share, trials=worth * (_Z / _student_t(clusters - 1)) ** 2)


def cluster_starts(*sorted_keys: npt.NDArray[np.generic]) -> IntArray:
    """Positions at which runs of equal keys begin, in arrays (N,) that are sorted together."""
    changes = [keys[1:] != keys[:-1] for keys in sorted_keys]
    first = [0] if len(sorted_keys[0]) else []
    return np.concatenate(
        [np.array(first, dtype=np.int64), 1 + np.flatnonzero(np.logical_or.reduce(changes))]
    )


def wilson(*, share: float, trials: float) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927); it also holds for few trials and near 0 and 1.

    Args:
        share: Successes / trials.
        trials: Number of independent trials; :func:`share_interval` is for pairs that share prompts.
    """
    if trials <= 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    shrink = 1 + _Z**2 / trials
    centre = (share + _Z**2 / (2 * trials)) / shrink
    half = _Z / shrink * float(np.sqrt(share * (1 - share) / trials + _Z**2 / (4 * trials**2)))
    # At 0 and 1 the bound is the share itself, up to rounding.
    return Interval(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


def _spread(numerators: FloatArray, denominators: FloatArray, multiplicities: IntArray | None) -> _Spread:
    clusters = len(numerators) if multiplicities is None else int(multiplicities.sum())
    total = _total(denominators, multiplicities)
    if total == 0:
        return _Spread(math.nan, clusters, math.nan)
    ratio = _total(numerators, multiplicities) / total
    if clusters < 2:
        return _Spread(ratio, clusters, math.nan)
    squares = np.square(numerators - ratio * denominators)
    return _Spread(ratio, clusters, clusters / (clusters - 1) * _total(squares, multiplicities) / total**2)


def _total(values: FloatArray, multiplicities: IntArray | None) -> float:
    return float(values.sum() if multiplicities is None else values @ multiplicities)


def _student_t(freedom: int) -> float:
    """The 97.5% quantile of Student's t, to 0.1%, for at least one degree of freedom."""
    few = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706)
    if freedom <= len(few):
        return few[freedom - 1]
    # Abramowitz and Stegun 1964, equation 26.7.5.
    z, n = _Z, freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )
