"""The paper's claims as statements on measured frontiers: is DPO's reward higher at equal KL?

A method's frontier in one repetition is the highest reward that it reaches within a KL of k: the points are
ordered by KL, each gets the highest reward up to it, and between two of them it is interpolated. Two methods
are compared over the KL at which both have policies: from the larger of their two smallest KLs to the smaller
of their two largest. The statement is about the mean difference of their frontiers there. Where they have no
such KL, nothing can be said.

The interval is a percentile bootstrap over repetitions and prompts together: both methods of a repetition
are drawn together, and all policies are measured on the same drawn prompts. With three repetitions such an
interval is too narrow rather than too wide.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from points import FloatArray, Point
from settings import TITLES, MethodName

from dpo_opt.analysis.intervals import Interval

Verdict = Literal["confirmed", "not confirmed", "undecided"]
_RESAMPLES = 1000
_LEVELS = 64
"""Values of KL at which two frontiers are compared."""


class Claim(NamedTuple):
    """One statement with what the data say of it."""

    statement: str
    difference: Interval
    """Of the mean rewards at equal KL, with a 95% interval."""
    kl: tuple[float, float]
    """Over which they are compared, in nats."""
    verdict: Verdict

    def as_record(self) -> dict[str, object]:
        """As JSON has it."""
        return self._asdict() | {"difference": self.difference.as_record()}


def claims(points: Sequence[Point]) -> list[Claim]:
    """Compare DPO with each other method that has points.

    Args:
        points: Of all methods, with ``sft`` (the reference) in every repetition, and equal prompts in each.
    """
    others: list[MethodName] = [
        name for name in TITLES if name != "dpo" and any(p.method == name for p in points)
    ]
    return [_claim(points, other) for other in others]


def frontier(kl: FloatArray, reward: FloatArray, at: FloatArray) -> FloatArray:
    """The highest reward within each KL.

    Args:
        kl: (P,) Of the policies, the reference first, at 0.
        reward: (P,) Theirs.
        at: (K,) Values of KL, not negative.

    Returns:
        (K,) Beyond the largest KL the highest reward of all.
    """
    order = np.argsort(kl, kind="stable")
    return np.interp(at, kl[order], np.maximum.accumulate(reward[order]))


def _claim(points: Sequence[Point], other: MethodName) -> Claim:
    seeds = sorted({point.seed for point in points})
    ours, theirs = ([_Arrays.of(points, method, seed) for seed in seeds] for method in ("dpo", other))
    prompts = ours[0].kl.shape[1]
    everything = np.arange(prompts)
    statement = f"DPO's reward is above that of {TITLES[other]} at equal KL"
    spans = [[p.kl.mean() for p in points if p.method == method] for method in ("dpo", other)]
    shared = (float(max(map(min, spans))), float(min(map(max, spans))))
    if shared[0] > shared[1]:
        return Claim(statement, Interval(np.nan, np.nan, np.nan), shared, "undecided")
    levels = np.linspace(*shared, _LEVELS)

    def difference(repetitions: np.ndarray, drawn: np.ndarray) -> float:
        of_each = [
            ours[r].frontier(drawn, levels).mean() - theirs[r].frontier(drawn, levels).mean()
            for r in repetitions
        ]
        return float(np.mean(of_each))

    random = np.random.default_rng(0)
    resampled = [
        difference(random.integers(len(seeds), size=len(seeds)), random.integers(prompts, size=prompts))
        for _ in range(_RESAMPLES)
    ]
    low, high = np.quantile(resampled, [0.025, 0.975])
    found = Interval(difference(np.arange(len(seeds)), everything), float(low), float(high))
    return Claim(statement, found, shared, verdict(found))


def verdict(difference: Interval) -> Verdict:
    """What an interval of the difference says: undecided where it holds 0."""
    if difference.low > 0:
        return "confirmed"
    return "not confirmed" if difference.high < 0 else "undecided"


class _Arrays(NamedTuple):
    """The points of one method in one repetition, the reference first."""

    kl: FloatArray  # (policies, prompts)
    reward: FloatArray  # (policies, prompts)

    @classmethod
    def of(cls, points: Sequence[Point], method: str, seed: int) -> "_Arrays":
        own = [p for p in points if p.seed == seed and p.method in ("sft", method)]
        own.sort(key=lambda point: point.method != "sft")
        return cls(np.stack([p.kl for p in own]), np.stack([p.reward for p in own]))

    def frontier(self, prompts: np.ndarray, levels: FloatArray) -> FloatArray:
        return frontier(self.kl[:, prompts].mean(axis=1), self.reward[:, prompts].mean(axis=1), levels)
