"""The preference losses: pure functions of what is known of each pair. A new loss is a new function here."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class LossInputs(NamedTuple):
    """What a loss may need of a batch of pairs; log-probs are sums over a completion, in nats."""

    chosen_logps: Tensor  # (pairs,) the policy's
    rejected_logps: Tensor  # (pairs,)
    ref_chosen_logps: Tensor  # (pairs,) the reference's
    ref_rejected_logps: Tensor  # (pairs,)
    chosen_lengths: Tensor  # (pairs,) scored tokens
    rejected_lengths: Tensor  # (pairs,)
    beta: float
    """Strength of the pull towards the reference."""
    label_smoothing: float
    """Assumed share of pairs whose labels are the wrong way round."""

    @property
    def chosen_rewards(self) -> Tensor:
        """(pairs,) implicit rewards, up to a term of the prompt (Rafailov et al. 2023, eq. 5)."""
        return self.beta * (self.chosen_logps - self.ref_chosen_logps)

    @property
    def rejected_rewards(self) -> Tensor:
        """(pairs,)"""
        return self.beta * (self.rejected_logps - self.ref_rejected_logps)


class PreferenceLoss(NamedTuple):
    """Values per pair."""

    losses: Tensor  # (pairs,)
    chosen_rewards: Tensor  # (pairs,) detached; beta x log-ratio
    rejected_rewards: Tensor  # (pairs,) detached


def sigmoid_losses(pairs: LossInputs) -> Tensor:
    """DPO (Rafailov et al. 2023, eq. 7); with label smoothing cDPO (Mitchell 2023, eq. 3).

    Returns:
        (pairs,)
    """
    margins = pairs.chosen_rewards - pairs.rejected_rewards
    swapped = pairs.label_smoothing
    return -(1 - swapped) * F.logsigmoid(margins) - swapped * F.logsigmoid(-margins)


LOSSES = {"sigmoid": sigmoid_losses}


def preference_loss(loss_type: str, pairs: LossInputs) -> PreferenceLoss:
    """Loss of each pair.

    Args:
        loss_type: A key of ``LOSSES``.
        pairs: A batch of them.
    """
    losses = LOSSES[loss_type](pairs)
    return PreferenceLoss(losses, pairs.chosen_rewards.detach(), pairs.rejected_rewards.detach())
