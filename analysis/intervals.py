"""95% confidence intervals for pairs that share prompts: a bootstrap over prompts, and Wilson's interval.

Pairs of one prompt are correlated, so an interval from resampling single pairs is too narrow (Miller,
arXiv 2411.00640). Here whole prompts are drawn. The seed is fixed: the same pairs always give the same
interval.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_Z = 1.959963984540054
_RESAMPLES = 1000
_SEED = 0


class Interval(NamedTuple):
    """An estimate with its 95% interval; the bounds are NaN if there is only one cluster."""

    value: float
    low: float
    high: float


# U = clusters given, R = resamples


def bootstrap_ratio(
    *, numerators: FloatArray, denominators: FloatArray, multiplicities: IntArray | None = None
) -> Interval:
    """Sum of numerators / sum of denominators, with a percentile bootstrap over clusters.

    For the mean of a value over pairs, a prompt's numerator is the sum of the value over its pairs, and its
    denominator is its number of pairs.

    Args:
        numerators: (U,) One sum per cluster.
        denominators: (U,) One sum per cluster, in the same order.
        multiplicities: (U,) How many equal clusters each entry counts for, 1 by default. Counts of pairs have
            few distinct values, and a million equal clusters then cost as much as one.
    """
    total = float(denominators.sum() if multiplicities is None else denominators @ multiplicities)
    if total == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    value = float(numerators.sum() if multiplicities is None else numerators @ multiplicities) / total
    clusters = len(numerators) if multiplicities is None else int(multiplicities.sum())
    if clusters < 2:
        return Interval(value, float("nan"), float("nan"))
    random = np.random.default_rng(_SEED)
    if multiplicities is None:
        ratios = np.empty(_RESAMPLES)
        for i in range(_RESAMPLES):
            drawn_U = random.integers(0, clusters, size=clusters)
            ratios[i] = numerators[drawn_U].sum() / denominators[drawn_U].sum()
    else:
        drawn_RU = random.multinomial(clusters, multiplicities / clusters, size=_RESAMPLES)
        ratios = (drawn_RU @ numerators) / (drawn_RU @ denominators)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def bootstrap_share(
    *, successes: FloatArray, trials: FloatArray, multiplicities: IntArray | None = None
) -> Interval:
    """A proportion over clusters: :func:`bootstrap_ratio`, with Wilson's bounds at exactly 0 and 1.

    At 0 and 1 all resamples are equal, and the bootstrap would claim certainty. Wilson's trials are clusters.
    """
    interval = bootstrap_ratio(numerators=successes, denominators=trials, multiplicities=multiplicities)
    if interval.value in (0.0, 1.0):
        clusters = float(len(trials) if multiplicities is None else multiplicities.sum())
        return wilson(share=interval.value, trials=clusters)
    return interval


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
        trials: Number of independent trials: prompts rather than pairs, if pairs share prompts.
    """
    if trials <= 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    shrink = 1 + _Z**2 / trials
    centre = (share + _Z**2 / (2 * trials)) / shrink
    half = _Z / shrink * float(np.sqrt(share * (1 - share) / trials + _Z**2 / (4 * trials**2)))
    # At 0 and 1 the bound is the share itself, up to rounding.
    return Interval(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))
