"""Losses that draw log-ratios towards a number, by squared error. Each returns the (pairs,) losses."""

import torch.nn.functional as F
from torch import Tensor

from dpo_opt.optimize.losses.difference import mean_score_difference
from dpo_opt.optimize.losses.divergences import Divergence, reverse_kl
from dpo_opt.optimize.losses.pair_inputs import LossInputs


def ipo(pairs: LossInputs, *, divergence: Divergence = reverse_kl) -> Tensor:
    """IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17), beta being its tau, on scores per token.

    As TRL (which asked the authors), LLaMA-Factory, ms-swift and HALOs have it. Its values and its beta
    cannot be compared with those of ``ipo_sum``.
    """
    return (mean_score_difference(pairs, divergence) - 1 / (2 * pairs.beta)) ** 2


def ipo_sum(pairs: LossInputs, *, divergence: Divergence = reverse_kl) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17) as it is printed, on sums: OpenRLHF's, NeMo-Aligner's, and the DPO
    authors'."""
    difference = divergence(pairs.chosen_logratios) - divergence(pairs.rejected_logratios)
    return (difference - 1 / (2 * pairs.beta)) ** 2


def sppo_hard(pairs: LossInputs) -> Tensor:
    """SPPO (Wu et al. 2024, arXiv 2405.00675, eq. 4.7) where chosen wins for certain.

    As in TRL; beta is 1 / eta of the paper.
    """
    target = 1 / (2 * pairs.beta)
    return (pairs.chosen_logratios - target) ** 2 + (pairs.rejected_logratios + target) ** 2


def cal_dpo(pairs: LossInputs) -> Tensor:
    """Cal-DPO (Xiao et al. 2024, arXiv 2412.14516): DPO at beta 1, and log-ratios drawn to
    +-1 / (2 beta).

    As in the paper's code, beta stands in the second term only, which is ``sppo_hard``.
    """
    contrast = -F.logsigmoid(pairs.chosen_logratios - pairs.rejected_logratios)
    return contrast + sppo_hard(pairs)
