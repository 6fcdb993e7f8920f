"""Losses of single completions, each with a label that says whether it is desirable.

In ``LossInputs`` a row's own completion is the side that its label names, and the other side is a completion
of another prompt. Each returns the (rows,) losses, whose mean is the step's loss.
"""

import torch
from torch import Tensor

from dpo_opt.optimize.losses.pair_inputs import LossInputs


def kto(pairs: LossInputs, *, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Tensor:
    """KTO (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7): w (1 - s(r - beta z0)) for a desirable
    completion, w (1 - s(beta z0 - r)) for an undesirable one.

    z0 is the mean log-ratio of all mismatched completions of the step, and at least 0. It has no gradient. As
    in TRL, where it is the mean of a micro-batch on all processes.

    Args:
        pairs: All rows of a step, with ``labels``.
        desirable_weight: The paper's lambda_D.
        undesirable_weight: The paper's lambda_U.

    Raises:
        ValueError: The rows have no labels.
    """
    if pairs.labels is None:
        raise ValueError("kto needs the label of each row")
    kl = pairs.kl
    if kl is None:
        kl = torch.relu(pairs.mismatched_logratios.detach().mean())
    shift = pairs.beta * kl
    rewards = torch.where(pairs.labels, pairs.chosen_rewards - shift, shift - pairs.rejected_rewards)
    lost = torch.sigmoid(-rewards)
    return torch.where(pairs.labels, desirable_weight * lost, undesirable_weight * lost)


def apo_zero_unpaired(
    pairs: LossInputs, *, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """APO-zero of single completions (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7, each of whose two
    terms is of one completion): w (1 - s(r)) for a desirable completion, w s(r) for an undesirable one.

    It is ``kto`` with a z0 of 0, so no row's loss depends on the others. As in TRL.

    Args:
        pairs: Rows with ``labels``.
        desirable_weight: What the losses of desirable completions are multiplied by.
        undesirable_weight: The same of undesirable ones.

    Raises:
        ValueError: The rows have no labels.
    """
    if pairs.labels is None:
        raise ValueError("apo_zero_unpaired needs the label of each row")
    return torch.where(
        pairs.labels,
        desirable_weight * torch.sigmoid(-pairs.chosen_rewards),
        undesirable_weight * torch.sigmoid(pairs.rejected_rewards),
    )
