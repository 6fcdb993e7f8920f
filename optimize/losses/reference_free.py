"""Losses that read no reference, and the two baselines without preference learning.

Each returns the (pairs,) losses. Cross-entropy is a mean over a completion's tokens, then over pairs, so
every pair counts alike; TRL averages over all tokens of a micro-batch, so there longer completions count
more.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_opt.optimize.losses.difference import smoothed_logistic
from dpo_opt.optimize.losses.pair_inputs import LossInputs

_HIGHEST_MEAN_LOGP = -1e-6
"""At 0 the odds of a completion are infinite, and rounding may lift a log-prob above 0."""


def simpo(pairs: LossInputs, *, label_smoothing: float = 0.0, simpo_gamma: float = 0.5) -> Tensor:
    """SimPO (Meng et al. 2024, arXiv 2405.14734, eq. 6), beta and gamma being the paper's.

    TRL's CPOTrainer has it as `loss_type="simpo"`, and adds `cpo_alpha` (1 by default) times cross-entropy,
    which the paper does not: that is `--loss-type simpo sft`. TRL, ms-swift and LLaMA-Factory take
    gamma / beta from the difference before beta multiplies it, which is the same.
    """
    margins = pairs.beta * (pairs.chosen_mean_logps - pairs.rejected_mean_logps) - simpo_gamma
    return smoothed_logistic(margins, label_smoothing)


def cpo(pairs: LossInputs, *, label_smoothing: float = 0.0, cpo_alpha: float = 1.0) -> Tensor:
    """CPO (Xu et al. 2024, arXiv 2401.08417, eq. 3): DPO without a reference; and cross-entropy of chosen.

    As TRL's CPOTrainer, the authors' code too: cross-entropy per token, times ``cpo_alpha``.
    """
    margins = pairs.beta * (pairs.chosen_logps - pairs.rejected_logps)
    return smoothed_logistic(margins, label_smoothing) + cpo_alpha * sft(pairs)


def orpo(pairs: LossInputs) -> Tensor:
    """ORPO (Hong et al. 2024, arXiv 2403.07691, eq. 6), beta being its lambda; odds are of mean log-probs.

    A mean log-prob above -1e-6 counts as -1e-6 in the odds. TRL's ORPOTrainer takes cross-entropy over prompt
    and completion; here, as in the paper's equation, it is the completion's.
    """
    log_odds = _log_odds(pairs.chosen_mean_logps) - _log_odds(pairs.rejected_mean_logps)
    return sft(pairs) - pairs.beta * F.logsigmoid(log_odds)


def _log_odds(mean_logps: Tensor) -> Tensor:
    below_zero = torch.clamp(mean_logps, max=_HIGHEST_MEAN_LOGP)
    return below_zero - torch.log(-torch.expm1(below_zero))


def sft(pairs: LossInputs) -> Tensor:
    """Cross-entropy of the chosen completion, per token. TRL's `sft` where each micro-batch has one pair."""
    return -pairs.chosen_mean_logps


def unlikelihood(pairs: LossInputs, *, unlikelihood_alpha: float = 1.0) -> Tensor:
    """The DPO paper's baseline (Rafailov et al. 2023, arXiv 2305.18290, section 6): chosen up, rejected down.

    On sums over the completions. It has no lower bound, and soon makes nonsense of a model, as the paper says
    of it. Welleck et al. 2019 push down 1 - p of each token; that loss is bounded, and is not this one.
    """
    return unlikelihood_alpha * pairs.rejected_logps - pairs.chosen_logps
