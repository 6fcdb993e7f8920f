"""The preference losses: pure functions of the pairs' log-probs. A new loss is a new function here."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class PreferenceLoss(NamedTuple):
    """Values per pair."""

    losses: Tensor  # (pairs,)
    chosen_rewards: Tensor  # (pairs,) detached; beta x log-ratio
    rejected_rewards: Tensor  # (pairs,) detached


def sigmoid_losses(margins: Tensor, *, label_smoothing: float) -> Tensor:
    """DPO (Rafailov et al. 2023, eq. 7); with label smoothing cDPO (Mitchell 2023, eq. 3).

    Args:
        margins: (pairs,) chosen minus rejected reward, beta included.
        label_smoothing: Assumed share of pairs whose labels are the wrong way round.
    """
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


LOSSES = {"sigmoid": sigmoid_losses}


def preference_loss(
    *,
    loss_type: str,
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """Loss of each pair.

    Args:
        loss_type: A key of ``LOSSES``.
        chosen_logps: (pairs,) policy log-probs summed over the chosen completion, in nats.
        rejected_logps: (pairs,) the same of the rejected completion.
        ref_chosen_logps: (pairs,) the reference's.
        ref_rejected_logps: (pairs,) the reference's.
        beta: Strength of the pull towards the reference.
        label_smoothing: See ``sigmoid_losses``.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    losses = LOSSES[loss_type](chosen_rewards - rejected_rewards, label_smoothing=label_smoothing)
    return PreferenceLoss(losses, chosen_rewards.detach(), rejected_rewards.detach())
