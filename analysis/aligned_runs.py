"""Puts the evaluations of several runs on one axis: their steps, or the KL of the checkpoints at these steps.

Two runs at the same step may be at quite different distances from the reference, so one that seems better may
only have gone further. Aligned by KL, they are compared at the same price.
"""

from collections.abc import Sequence

from dpo_opt.analysis.figures.runs import RunCurve
from dpo_opt.analysis.view import RunView

_ACCURACY = "eval_rewards/accuracies"


def by_step(views: Sequence[RunView]) -> list[RunCurve]:
    """Held-out accuracy against steps, of the runs that were evaluated."""
    found = []
    for view in views:
        evals = view.run.evals
        if _ACCURACY in evals.columns and len(known := evals.drop_nulls(_ACCURACY)):
            found.append(RunCurve(view.run.name, known["step"].to_list(), known[_ACCURACY].to_list()))
    return found


def by_kl(views: Sequence[RunView]) -> list[RunCurve]:
    """The same against KL per completion, in nats, where both were measured at a step."""
    found = []
    for view, curve in zip(_evaluated(views), by_step(views), strict=True):
        accuracy = dict(zip(curve.at, curve.accuracy, strict=True))
        points = [
            ((kl.estimate.rb_sequence or kl.estimate.k1_sequence).value, accuracy[kl.step])
            for kl in view.kl
            if kl.step in accuracy
        ]
        if points:
            found.append(RunCurve(curve.run, *map(list, zip(*points, strict=True))))
    return found


def _evaluated(views: Sequence[RunView]) -> list[RunView]:
    return [view for view in views if by_step([view])]
