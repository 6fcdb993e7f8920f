"""Causes that lie in how far and how long the policy was moved: learning rate, beta, epochs.

Each function returns what it found, None if there is nothing, or why that is not known. Thresholds were set
on other seeds than those of the experiment that tests them (bench/planted_causes.py).
"""

import math

from dpo_opt.analysis import generalization, rewards
from dpo_opt.analysis.diagnosis.evidence import FEW, FEWEST, Evidence
from dpo_opt.analysis.diagnosis.finding import Finding, Measure, Missing, exact
from dpo_opt.analysis.diagnosis.setup import REFERENCE_FREE
from dpo_opt.analysis.outcomes import means_over_prompts, shares_over_prompts

_UNTRAINED = math.log(2)
_NOTHING = 0.02
"""Nats of reward: a pair's weight in the gradient is then within a hundredth of what it was at the start."""
_HARM = 0.1
"""Nats of loss above that of an untrained policy."""
_CLEAR_SIGNAL = 0.75
"""Where so many are ranked right, a high loss comes from a few wrong labels."""
_FAR = 0.15
"""Nats per token."""
_UNSATURATED = 0.5
"""Nats of reward: pairs then still have three quarters of the weight that they began with."""
_MEMORIZED = 0.1
"""Of the pairs, between the intervals of those that were trained on and those that were not."""


def nothing_learnt(evidence: Evidence) -> Finding | Missing | None:
    """the policy hardly moved"""
    pairs = evidence.unseen
    if len(pairs) < FEWEST:
        return FEW
    size = rewards.margin(beta=evidence.run.beta).abs()
    moved, distance = means_over_prompts(pairs, size, rewards.distance_per_token())
    # With a tiny beta a policy may go far, and its rewards stay small.
    if not moved.high < _NOTHING or distance.high > _FAR:
        return None
    return Finding(
        cause="nothing_learnt",
        title="Nothing was learnt: the policy is still its reference",
        evidence=(
            Measure(
                "mean size of the reward margin of unseen pairs",
                moved,
                "nats",
                f"found below {_NOTHING:g}",
            ),
            Measure("distance from the reference", distance, "nats per token"),
            *_learning_rate(evidence),
            Measure("steps", exact(evidence.steps)),
        ),
        action="raise --learning-rate tenfold; if the margins then grow but stay small, train for more steps",
    )


def _learning_rate(evidence: Evidence) -> list[Measure]:
    """The setting, since training logs the rates of some steps alone: they may all miss the highest one."""
    setting, train = evidence.run.config.get("learning_rate"), evidence.run.train
    logged = train["learning_rate"].max() if "learning_rate" in train.columns else None
    if isinstance(setting, int | float):
        limit = f"at most {logged:.3g} in the logged steps" if isinstance(logged, float) else ""
        return [Measure("--learning-rate", exact(float(setting)), limit=limit)]
    return [Measure("highest logged learning rate", exact(logged))] if isinstance(logged, float) else []


def learning_rate_too_high(evidence: Evidence) -> Finding | Missing | None:
    """within the first epoch pairs got worse than they began"""
    pairs = evidence.fresh
    if len(pairs) < FEWEST:
        return FEW
    beta = evidence.run.beta
    loss = rewards.sigmoid_loss(beta=beta)
    mean_loss, size = means_over_prompts(pairs, loss, rewards.margin(beta=beta).abs())
    _, (right,) = shares_over_prompts(pairs, rewards.accuracy())
    if not mean_loss.low > _UNTRAINED + _HARM or right.low > _CLEAR_SIGNAL:
        return None
    return Finding(
        cause="learning_rate_too_high",
        title="The learning rate is too high: training makes pairs worse that it has not seen yet",
        evidence=(
            Measure(
                "loss of pairs in the first epoch, before they are trained on",
                mean_loss,
                "nats",
                f"{_UNTRAINED:.3f} before training; found above {_UNTRAINED + _HARM:.3f}",
            ),
            Measure("mean size of their reward margin", size, "nats"),
            Measure("ranked right among them", right, "%"),
        ),
        rows=tuple(pairs.sort(loss, descending=True)["row"].to_list()),
        action="lower --learning-rate to a tenth",
    )


def beta_too_low(evidence: Evidence) -> Finding | Missing | None:
    """the policy drifts far from the reference and the loss does not stop it"""
    if REFERENCE_FREE.intersection(evidence.losses):
        return Missing("the loss has no reference")
    pairs = evidence.unseen
    if len(pairs) < FEWEST:
        return FEW
    drift = rewards.distance_per_token()
    far, size = means_over_prompts(pairs, drift, rewards.margin(beta=evidence.run.beta).abs())
    if not (far.low > _FAR and size.high < _UNSATURATED):
        return None
    return Finding(
        cause="beta_too_low",
        title="Beta is too low: the policy drifts from its reference and nothing holds it",
        evidence=(
            Measure("distance from the reference", far, "nats per token", f"found above {_FAR:g}"),
            Measure(
                "mean size of the reward margin, which holds the policy once it is above 1",
                size,
                "nats",
                f"found below {_UNSATURATED:g}",
            ),
            Measure("beta", exact(evidence.run.beta)),
        ),
        rows=tuple(pairs.sort(drift, descending=True)["row"].to_list()),
        action="raise --beta tenfold",
    )


def overfitting(evidence: Evidence) -> Finding | Missing | None:
    """pairs that were trained on are ranked better than held-out ones, whose loss rises"""
    seen, held_out = evidence.seen, evidence.evaluated
    if len(seen) < FEWEST:
        if len(seen) or not (len(evidence.start) or len(evidence.fresh)):
            return Missing(f"fewer than {FEWEST} pairs have log-probs from after they were trained on")
        return None  # no pair was trained on twice
    if len(held_out) < FEWEST:
        return Missing("too few prompts were held out (--eval-split)")
    _, (trained,) = shares_over_prompts(seen, rewards.accuracy())
    _, (unseen,) = shares_over_prompts(held_out, rewards.accuracy())
    loss = rewards.sigmoid_loss(beta=evidence.run.beta)
    seen_loss, loss_now = (*means_over_prompts(seen, loss), *means_over_prompts(held_out, loss))
    known = generalization.overfitting({}, evidence.run.evals)
    if known is None or known.lowest is None or not trained.low > unseen.high + _MEMORIZED:
        return None
    step, lowest = known.lowest
    return Finding(
        cause="overfitting",
        title="The run learned its pairs by heart: held-out pairs get worse",
        evidence=(
            Measure("ranked right, pairs trained on before", trained, "%"),
            Measure("ranked right, held-out pairs", unseen, "%"),
            Measure("held-out loss at the end", loss_now, "nats"),
            Measure("lowest held-out loss", exact(lowest), "nats", f"at step {step:,}"),
            Measure("loss of pairs trained on before", seen_loss, "nats"),
        ),
        rows=tuple(held_out.sort(loss, descending=True)["row"].to_list()),
        action=f"stop earlier: --max-steps {step}, or --num-train-epochs 1",
    )
