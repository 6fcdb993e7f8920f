"""Where each loss begins, and one pair's loss and gradients."""

import math
from typing import Any, NamedTuple

import torch

from dpo_opt.optimize import preference_loss
from dpo_opt.optimize.losses.pair_inputs import LossInputs
from dpo_opt.optimize.losses.preference_loss import UNPAIRED

NEEDED: dict[str, dict[str, float]] = {"exo_pair": {"label_smoothing": 1e-3}, "rdpo": {"rdpo_alpha": 0.01}}
"""Options without a default."""


class Start(NamedTuple):
    """A loss where policy equals reference, and where descent moves each log-prob."""

    loss: float
    chosen: str
    rejected: str


LN2 = math.log(2)
CHOSEN, REJECTED = -3 / 4, -3 / 2
"""Mean log-probs of the pair."""
_ODDS = math.log(math.expm1(-REJECTED) / math.expm1(-CHOSEN))


def _logistic(margin: float) -> float:
    return math.log1p(math.exp(-margin))


AT_START = {
    "sigmoid": Start(LN2, "up", "down"),
    "robust": Start(LN2, "up", "down"),
    "hinge": Start(1.0, "up", "down"),
    "exo_pair": Start(-LN2 - (math.log(1e-3) + math.log1p(-1e-3)) / 2, "up", "down"),
    # At tau 0.05 a margin of 0 lies on a slope towards -0.12: not what one expects, but the paper's equation.
    "discopop": Start((LN2 + 1) / 2, "down", "up"),
    "sigmoid_norm": Start(LN2, "up", "down"),
    "ipo": Start(25.0, "up", "down"),
    "ipo_sum": Start(25.0, "up", "down"),
    "sppo_hard": Start(50.0, "up", "down"),
    "cal_dpo": Start(LN2 + 50, "up", "down"),
    # The two terms of chosen leave a quarter of beta.
    "nca_pair": Start(2 * LN2, "up", "down"),
    "apo_zero": Start(1.0, "up", "down"),
    # Both terms cancel for chosen at the start; it falls as the two come apart.
    "apo_down": Start(1.0, "-", "down"),
    "rdpo": Start(_logistic(0.02), "up", "down"),
    "dpop": Start(LN2, "up", "down"),
    "odpo": Start(_logistic(-1.0), "up", "down"),
    "rpo": Start(LN2 - _logistic(1.0) - 1 / (1 + math.e), "up", "down"),
    # Where no step was before, the shift is 0.
    "bco_pair": Start(2 * LN2, "up", "down"),
    # Of two rows, as a pair becomes them.
    "kto": Start(0.5, "up", "down"),
    "apo_zero_unpaired": Start(0.5, "up", "down"),
    "kto_pair": Start(0.5, "up", "down"),
    "aot": Start(LN2, "up", "down"),
    "aot_unpaired": Start(LN2, "up", "down"),
    "beta_dpo": Start(LN2, "up", "down"),
    "simpo": Start(_logistic(0.1 * (CHOSEN - REJECTED) - 0.5), "up", "down"),
    "cpo": Start(LN2 - CHOSEN, "up", "down"),
    "orpo": Start(-CHOSEN + 0.1 * _logistic(_ODDS), "up", "down"),
    "sft": Start(-CHOSEN, "up", "-"),
    "unlikelihood": Start(0.0, "up", "down"),
}


class OnePair(NamedTuple):
    """Of one pair, with respect to the policy's log-probs."""

    loss: float
    chosen_gradient: float
    rejected_gradient: float


def of_one_pair(
    name: str,
    chosen: float,
    rejected: float,
    *,
    reference: float = -3.0,
    beta: float = 0.1,
    margin: float = 1.0,
    lengths: tuple[int, int] = (4, 2),
    **options: Any,
) -> OnePair:
    """Log-ratios of one pair to its loss; each completion is worth ``reference`` nats to the reference.

    Of a loss of unpaired rows it is the mean over two: chosen is desirable, and rejected is not.
    """
    ref = torch.full((1,), reference, dtype=torch.float64)
    chosen_logps, rejected_logps = ((ref + side).requires_grad_() for side in (chosen, rejected))
    labels = torch.tensor([True, False] if name in UNPAIRED else [True])
    pairs = LossInputs(
        chosen_logps.expand(len(labels)),
        rejected_logps.expand(len(labels)),
        ref.expand(len(labels)),
        ref.expand(len(labels)),
        torch.tensor([lengths[0]]),
        torch.tensor([lengths[1]]),
        beta=beta,
        data_margins=torch.tensor([margin], dtype=torch.float64),
        labels=labels,
    )
    loss = preference_loss(name, pairs, **options).losses.mean()
    gradients = torch.autograd.grad(loss, [chosen_logps, rejected_logps], materialize_grads=True)
    return OnePair(loss.item(), *(gradient.item() for gradient in gradients))
