"""The preference losses: pure functions of each pair's log-probs. A new loss is a new entry of ``LOSSES``."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class LossInputs(NamedTuple):
    """What a loss may need from a batch of pairs. Log-probs are sums over a completion, in nats."""

    chosen_logps: Tensor  # (pairs,) the policy's
    rejected_logps: Tensor  # (pairs,)
    ref_chosen_logps: Tensor  # (pairs,) the reference's
    ref_rejected_logps: Tensor  # (pairs,)
    chosen_lengths: Tensor  # (pairs,) scored tokens
    rejected_lengths: Tensor  # (pairs,)
    beta: float
    """DPO's beta: how strongly the policy is held to the reference."""
    label_smoothing: float
    """Share of pairs whose chosen and rejected are assumed to be swapped."""

    @property
    def chosen_rewards(self) -> Tensor:
        """(pairs,) implicit rewards of the chosen completions, up to a term that depends only on the prompt
        (Rafailov et al. 2023, eq. 5)."""
        return self.beta * (self.chosen_logps - self.ref_chosen_logps)

    @property
    def rejected_rewards(self) -> Tensor:
        """(pairs,) implicit rewards of the rejected completions."""
        return self.beta * (self.rejected_logps - self.ref_rejected_logps)


class PreferenceLoss(NamedTuple):
    """Loss and rewards of each pair."""

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
    """Loss and rewards of each pair.

    Args:
        loss_type: A key of ``LOSSES``.
        pairs: A batch of pairs.
    """
    losses = LOSSES[loss_type](pairs)
    return PreferenceLoss(losses, pairs.chosen_rewards.detach(), pairs.rejected_rewards.detach())
