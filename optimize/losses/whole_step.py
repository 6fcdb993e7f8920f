"""Losses that look at all pairs of a step at once, or at the steps before.

Each returns the (pairs,) losses, whose mean is the step's loss.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_opt.optimize.losses.difference import smoothed_logistic
from dpo_opt.optimize.losses.pair_inputs import LossInputs

_LOWEST_BETA = 1e-3
"""Of beta-DPO's beta: that of its authors' code."""


def bco_pair(pairs: LossInputs) -> Tensor:
    """BCO of two completions (Jung et al. 2024, arXiv 2404.04656):
    -log s(r_chosen - d) - log s(d - r_rejected), d being the mean reward of all training pairs so far, these
    included.

    d has no gradient. LLaMA-Factory and ms-swift have it, and TRL had it, with each micro-batch's mean
    counting alike; in TRL 1.16 d is 0.
    """
    shift = pairs.running.reward
    return -F.logsigmoid(pairs.chosen_rewards - shift) - F.logsigmoid(shift - pairs.rejected_rewards)


def kto_pair(pairs: LossInputs) -> Tensor:
    """KTO on pairs (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7): half of
    s(beta z_rejected - r_chosen) + s(r_rejected - beta z_chosen), z being the mean log-ratio of that side
    over the step, and at least 0.

    Each side is measured from the other side's z, as early versions of TRL and LLaMA-Factory have it. Unlike
    there, z has no gradient, as the paper says, and is the whole step's, not a micro-batch's.
    """
    of_chosen, of_rejected = (
        torch.relu(rewards.detach().mean()) for rewards in (pairs.chosen_rewards, pairs.rejected_rewards)
    )
    lost = torch.sigmoid(of_rejected - pairs.chosen_rewards)
    return (lost + torch.sigmoid(pairs.rejected_rewards - of_chosen)) / 2


def aot(pairs: LossInputs, *, label_smoothing: float = 0.0) -> Tensor:
    """AOT (Melnyk et al. 2024, arXiv 2406.05882) of pairs: the k-th smallest difference of both log-probs
    under the policy against the k-th smallest under the reference.

    As in TRL, where only the pairs of a micro-batch are sorted.
    """
    policy = pairs.chosen_logps - pairs.rejected_logps
    return _ranked(policy, pairs.ref_chosen_logps - pairs.ref_rejected_logps, pairs.beta, label_smoothing)


def aot_unpaired(pairs: LossInputs, *, label_smoothing: float = 0.0) -> Tensor:
    """AOT (Melnyk et al. 2024, arXiv 2406.05882) without pairs: the k-th smallest log-ratio of all chosen
    completions against the k-th smallest of all rejected ones.

    As in TRL, where only the pairs of a micro-batch are sorted.
    """
    return _ranked(pairs.chosen_logratios, pairs.rejected_logratios, pairs.beta, label_smoothing)


def _ranked(above: Tensor, below: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """(pairs,) each rank's loss, at the place of the pair that has this rank ``above``."""
    ranked, order = torch.sort(above, stable=True)
    losses = smoothed_logistic(beta * (ranked - torch.sort(below, stable=True).values), label_smoothing)
    return torch.zeros_like(losses).scatter(0, order, losses)


def beta_dpo(pairs: LossInputs, *, beta_dpo_alpha: float = 0.6, beta_dpo_filtered: float = 0.2) -> Tensor:
    """beta-DPO (Wu et al. 2024, arXiv 2407.08639): DPO of the pairs that a draw leaves in, with
    beta (1 + alpha (M - M0)). M is their mean difference of log-ratios, and M0 the moving average over steps.

    Pairs far from M0 are likely to be left out: the draw, without replacement, weighs each by the density of
    a normal distribution around M0, with the moving average of the standard deviation. Beta has no gradient,
    and is at least 0.001. All as in the authors' code, where both averages take in the step first, begin at 0
    and have a momentum of 0.9, and log-ratios are not multiplied by beta. In an evaluation no pair is left
    out.

    Args:
        pairs: All pairs of a step.
        beta_dpo_alpha: How much beta follows M.
        beta_dpo_filtered: Share of the pairs that is left out; one is left in anyway.
    """
    margins = pairs.margins
    taken = _taken(pairs, beta_dpo_filtered)
    share = taken.mean()
    moved = (margins.detach() * taken).mean() / share - pairs.running.margin
    # Running margins are rewards, beta times the difference of log-ratios.
    factor = torch.clamp(1 + beta_dpo_alpha * moved / pairs.beta, min=_LOWEST_BETA / pairs.beta)
    # So that the mean over all pairs is that of those that are left in.
    return -F.logsigmoid(factor * margins) * (taken / share)


def _taken(pairs: LossInputs, filtered: float) -> Tensor:
    """(pairs,) 1 for those that are left in, 0 for the others."""
    margins = pairs.margins.detach()
    if pairs.draws is None:
        return torch.ones_like(margins)
    log_weights = torch.zeros_like(margins)
    if pairs.running.spread > 0:
        log_weights = -0.5 * ((margins - pairs.running.margin) / pairs.running.spread) ** 2
    # The greatest of these are a draw without replacement (Gumbel's trick); weights would be rounded to 0.
    keys = log_weights - torch.log(-torch.log(pairs.draws))
    places = torch.topk(keys, max(1, int(len(margins) * (1 - filtered)))).indices
    return torch.zeros_like(margins).index_fill(0, places, 1.0)
