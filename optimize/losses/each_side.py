"""Losses with a term for each completion, so that the reward itself is steered, not only its difference.

They take no f-divergence: what depends only on the prompt would not cancel. Each returns the (pairs,) losses.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_opt.optimize.losses.pair_inputs import LossInputs


def nca_pair(pairs: LossInputs) -> Tensor:
    """NCA of two completions (Chen et al. 2024, arXiv 2402.05369):
    -log s(r_chosen) - (log s(-r_chosen) + log s(-r_rejected)) / 2. As in TRL."""
    both = F.logsigmoid(-pairs.chosen_rewards) + F.logsigmoid(-pairs.rejected_rewards)
    return -F.logsigmoid(pairs.chosen_rewards) - 0.5 * both


def apo_zero(pairs: LossInputs) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7). As in TRL."""
    return torch.sigmoid(-pairs.chosen_rewards) + torch.sigmoid(pairs.rejected_rewards)


def apo_down(pairs: LossInputs) -> Tensor:
    """APO-down (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8). As in TRL."""
    return torch.sigmoid(pairs.chosen_rewards) + torch.sigmoid(-pairs.margins)
