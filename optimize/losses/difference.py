"""Losses of DPO's margin: beta times the score of chosen minus that of rejected.

What depends only on the prompt cancels in it, so any f-divergence may give the scores. Each returns the
(pairs,) losses.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_opt.optimize.losses.divergences import LARGEST_EXPONENT, Divergence, reverse_kl
from dpo_opt.optimize.losses.pair_inputs import LossInputs


def _margins(pairs: LossInputs, divergence: Divergence) -> Tensor:
    """(pairs,); with the reverse KL the difference of the implicit rewards."""
    return pairs.beta * divergence(pairs.chosen_logratios) - pairs.beta * divergence(pairs.rejected_logratios)


def mean_score_difference(pairs: LossInputs, divergence: Divergence) -> Tensor:
    """(pairs,) each completion's score per scored token, chosen's minus rejected's."""
    chosen = divergence(pairs.chosen_logratios) / pairs.chosen_lengths
    return chosen - divergence(pairs.rejected_logratios) / pairs.rejected_lengths


def smoothed_logistic(margins: Tensor, label_smoothing: float) -> Tensor:
    """(pairs,) -log s(margin), of the swapped pair for a share of the labels."""
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


def sigmoid(
    pairs: LossInputs, *, divergence: Divergence = reverse_kl, label_smoothing: float = 0.0
) -> Tensor:
    """DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7); with label smoothing cDPO (Mitchell 2023, eq. 3).

    TRL's `sigmoid` reads no label smoothing. OpenRLHF, LLaMA-Factory, open-instruct and ms-swift have cDPO as
    here.
    """
    return smoothed_logistic(_margins(pairs, divergence), label_smoothing)


def robust(pairs: LossInputs, *, divergence: Divergence = reverse_kl, label_smoothing: float = 0.0) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024, arXiv 2403.00409): with a share e of swapped labels, DPO's loss on
    clean ones in expectation, ((1 - e) L(chosen > rejected) - e L(rejected > chosen)) / (1 - 2e).

    It has no lower bound where e is above 0. As in TRL.
    """
    margins, swapped = _margins(pairs, divergence), label_smoothing
    return (-(1 - swapped) * F.logsigmoid(margins) + swapped * F.logsigmoid(-margins)) / (1 - 2 * swapped)


def hinge(pairs: LossInputs, *, divergence: Divergence = reverse_kl) -> Tensor:
    """max(0, 1 - margin): SLiC's hinge (Zhao et al. 2023, arXiv 2305.10425) on DPO's margin, as RSO (Liu et
    al. 2023, arXiv 2309.06657) and TRL have it.

    SLiC itself has no reference and adds cross-entropy, as HALOs does: that is not this loss.
    """
    return torch.relu(1 - _margins(pairs, divergence))


def exo_pair(pairs: LossInputs, *, divergence: Divergence = reverse_kl, label_smoothing: float) -> Tensor:
    """EXO-pref (Ji et al. 2024, arXiv 2402.00856, eq. 16): KL from the policy's preference to the smoothed
    label.

    TRL refuses a label smoothing of 0 too, where the loss is infinite; ms-swift takes 1e-3 then, and says
    nothing.
    """
    margins = _margins(pairs, divergence)
    of_chosen = torch.sigmoid(margins) * (F.logsigmoid(margins) - math.log1p(-label_smoothing))
    of_rejected = torch.sigmoid(-margins) * (F.logsigmoid(-margins) - math.log(label_smoothing))
    return of_chosen + of_rejected


def discopop(pairs: LossInputs, *, divergence: Divergence = reverse_kl, discopop_tau: float = 0.05) -> Tensor:
    """DiscoPOP's log-ratio modulated loss (Lu et al. 2024, arXiv 2406.08414, eq. 5).

    The exponential and the weight that keeps it small are multiplied as exponents, so with tau below 1
    nothing overflows; from 1 on the exponent is clamped. TRL multiplies infinity and 0 at margins below -88.
    """
    margins = _margins(pairs, divergence)
    exponent = -margins + F.logsigmoid(margins / discopop_tau)
    exponential = torch.exp(torch.clamp(exponent, max=LARGEST_EXPONENT))
    return -F.logsigmoid(margins) * torch.sigmoid(-margins / discopop_tau) + exponential


def sigmoid_norm(pairs: LossInputs, *, divergence: Divergence = reverse_kl) -> Tensor:
    """DPO on scores per token, Tulu 3's length-normalised DPO (Lambert et al. 2024, arXiv 2411.15124).

    As in TRL, whose help calls it SimPO; it keeps the reference and has no gamma. open-instruct's `dpo_norm`,
    and NeMo-RL's `preference_average_log_probs`, are the same.
    """
    return -F.logsigmoid(pairs.beta * mean_score_difference(pairs, divergence))
