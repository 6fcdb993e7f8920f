"""Causes that lie in the pairs: wrong labels, one source, length, completions that are nearly the same.

Each function returns what it found, None if there is nothing, or why that is not known. Thresholds were set
on other seeds than those of the experiment that tests them (bench/planted_causes.py).
"""

import math

import numpy as np
import polars as pl

from dpo_opt.analysis import rewards
from dpo_opt.analysis.diagnosis.evidence import FEW, FEWEST, Evidence
from dpo_opt.analysis.diagnosis.finding import Finding, Measure, Missing, exact
from dpo_opt.analysis.intervals import wilson
from dpo_opt.analysis.outcomes import by_source, means_over_prompts, shares_over_prompts
from dpo_opt.analysis.triage import MOST_OVERLAP
from dpo_opt.schemas.errors import quoted

_SWAPPED = 0.02
"""More of the pairs than chance."""
_SURELY = 0.5
"""Of the median margin, below 0."""
_LEAST_SEPARATION = 1.0
"""Median margin, in standard deviations: a weaker signal cannot tell a wrong label from a hard pair."""
_BIASED = 0.6
"""Share of the pairs whose labels prefer the same length as the policy."""
_LEAST_SIDE = 10
_FELL = 0.02
"""Nats per token."""
_ALIKE = 0.2
"""Of the unseen pairs; with fewer, displacement cannot come from near-identical completions."""
_FIRST_SLICES = 10
"""Evenly spread: pairs that stand together and are a fifth of all fill one of them at least."""
_ENOUGH = 1000
"""Pairs in these slices: with fewer, all are read at once."""


def one_source_against(evidence: Evidence) -> Finding | Missing | None:
    """one source is ranked wrongly while the others are ranked right"""
    pairs = evidence.unseen
    if len(pairs) < FEWEST:
        return FEW
    sources = [s for s in by_source(pairs, beta=evidence.run.beta) if s.source is not None]
    if len(sources) < 2:
        return Missing("the pairs do not name two sources")
    against = min(sources, key=lambda s: s.reward_accuracy.high)
    rest = pairs.filter(pl.col("source").cast(pl.String) != against.source)
    _, (others,) = shares_over_prompts(rest, rewards.accuracy())
    if not (against.reward_accuracy.high < 0.5 < others.low):
        return None
    margin = rewards.margin(beta=evidence.run.beta)
    own = pairs.filter(pl.col("source").cast(pl.String) == against.source)
    return Finding(
        cause="one_source_against",
        title=f"The source {quoted(against.source)} pulls against the others",
        evidence=(
            Measure(f"ranked right, unseen pairs of {quoted(against.source)}", against.reward_accuracy, "%"),
            Measure("ranked right, unseen pairs of the others", others, "%"),
        ),
        rows=tuple(own.sort(margin)["row"].to_list()),
        action=f"read these pairs of {quoted(against.source)}; swap its labels or leave it out",
    )


def length_exploited(evidence: Evidence) -> Finding | Missing | None:
    """the policy prefers the longer completion, or the shorter one, whichever was chosen"""
    pairs = evidence.unseen
    difference = rewards.length_difference()
    sides = [pairs.filter(difference > 0), pairs.filter(difference < 0)]
    if min(map(len, sides)) < _LEAST_SIDE:
        return Missing("too few unseen pairs have completions of different lengths on either side")
    longer, shorter = (share for side in sides for share in shares_over_prompts(side, rewards.accuracy())[1])
    high, low, name = (
        (longer, shorter, "longer") if longer.value > shorter.value else (shorter, longer, "shorter")
    )
    other = "shorter" if name == "longer" else "longer"
    margin = rewards.margin(beta=evidence.run.beta)
    wrong = sides[1] if name == "longer" else sides[0]
    trials = len(sides[0]) + len(sides[1])
    labelled = wilson(share=len(sides[0] if name == "longer" else sides[1]) / trials, trials=trials)
    # A policy that learned little ranks by length too: log-ratios are sums over tokens.
    if not (labelled.low > _BIASED and low.value < 0.5 and high.low > max(0.5, low.high)):
        return None
    return Finding(
        cause="length_exploited",
        title=f"Length is exploited: the policy learned to prefer the {name} completion",
        evidence=(
            Measure(f"ranked right where the {name} completion was chosen", high, "%"),
            Measure(f"ranked right where the {other} completion was chosen", low, "%"),
            Measure(
                f"unseen pairs of unequal length whose {name} completion was chosen",
                labelled,
                "%",
                f"found above {_BIASED:.0%}",
            ),
        ),
        rows=tuple(wrong.sort(margin)["row"].to_list()),
        action="weigh length down: --ld-alpha 0.5, or --loss-type sigmoid_norm",
    )


def likelihood_displacement(evidence: Evidence) -> Finding | Missing | None:
    """chosen completions become less likely where both completions are nearly the same"""
    pairs = evidence.unseen
    if len(pairs) < FEWEST:
        return FEW
    near = pl.col("token_overlap") >= MOST_OVERLAP
    # All token ids of a large folder take longer to read than all else that is asked for.
    some = evidence.token_overlaps(pairs, slices=_FIRST_SLICES)
    if len(some) >= _ENOUGH and len(some.filter(near)) / len(some) < _ALIKE / 8:
        return None
    rows = evidence.token_overlaps(pairs).filter(near)["row"]
    alike = pairs.filter(pl.col("row").is_in(rows.implode()))
    share = len(alike) / len(pairs)
    if share < _ALIKE:
        return None
    fall = rewards.chosen_logratio_per_token()
    fell, margin = means_over_prompts(alike, fall, rewards.margin(beta=evidence.run.beta))
    _, (falling,) = shares_over_prompts(alike, rewards.chosen_fell())
    if not (fell.high < -_FELL and falling.low > 0.5):
        return None
    return Finding(
        cause="likelihood_displacement",
        title="Likelihood displacement: chosen completions become less likely, beside near-identical ones",
        evidence=(
            Measure("unseen pairs whose completions share nearly all tokens", exact(share), "%"),
            Measure(
                "log-ratio of their chosen completions", fell, "nats per token", f"found below -{_FELL:g}"
            ),
            Measure("chosen completions that fell", falling, "%"),
            Measure("their mean reward margin", margin, "nats"),
        ),
        rows=tuple(alike.sort(fall)["row"].to_list()),
        action="hold chosen up with --loss-type dpop, or weight such pairs down: "
        f"dpo-opt triage --shards {quoted(evidence.run.shards)} --write-weights near_identical",
    )


def swapped_labels(evidence: Evidence) -> Finding | Missing | None:
    """more pairs than chance are ranked wrongly, and as surely as others are ranked right"""
    pairs = evidence.unseen
    if len(pairs) < FEWEST:
        return FEW
    margin = rewards.margin(beta=evidence.run.beta)
    margins = pairs.select(margin.alias("margin"))["margin"].drop_nans().to_numpy()
    middle, upper = np.quantile(margins, [0.5, 0.84])
    # The upper half is free of swapped pairs: its spread says how many would lie below by chance.
    separation = float(middle / max(upper - middle, 1e-12))
    if middle <= 0 or separation < _LEAST_SEPARATION:
        return None
    mirrored = margin < -_SURELY * float(middle)
    _, (share,) = shares_over_prompts(pairs, mirrored)
    chance = 0.5 * math.erfc((1 + _SURELY) * separation / math.sqrt(2))
    if not share.low > chance + _SWAPPED:
        return None
    return Finding(
        cause="swapped_labels",
        title=f"About {share.value:.0%} of the labels look swapped",
        evidence=(
            Measure(
                "unseen pairs ranked wrong, at least half as surely as the typical pair is ranked right",
                share,
                "%",
                f"{chance:.1%} were expected by chance",
            ),
            Measure("median reward margin of unseen pairs", exact(float(middle)), "nats"),
        ),
        rows=tuple(pairs.filter(mirrored).sort(margin)["row"].to_list()),
        action="read these pairs and swap or drop those that are wrong; --loss-type robust --label-smoothing "
        f"{min(0.45, round(share.value, 2)):g} allows for the rest",
    )
