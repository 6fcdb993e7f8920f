"""DPO with a further term in its margin, from lengths, from the data's own margin, or from the reference.

Each returns the (pairs,) losses.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_opt.optimize.losses.pair_inputs import LossInputs


def rdpo(pairs: LossInputs, *, rdpo_alpha: float) -> Tensor:
    """R-DPO (Park et al. 2024, arXiv 2403.19159): -log s(margin + alpha (|chosen| - |rejected|)).

    DPO's derivation with a cost of alpha for each token: what length explains of a preference is added to the
    margin, so the policy has less to explain. With the other sign length would be rewarded.
    """
    # In the margins' dtype: a number times a tensor of integers would be float32.
    longer = (pairs.chosen_lengths - pairs.rejected_lengths).to(pairs.chosen_logps)
    return -F.logsigmoid(pairs.margins + rdpo_alpha * longer)


def dpop(pairs: LossInputs, *, dpop_lambda: float = 50.0) -> Tensor:
    """DPO-Positive, DPOP, of Smaug (Pal et al. 2024, arXiv 2402.13228):
    -log s(margin - beta lambda max(0, log reference(chosen) / policy(chosen))).

    Where chosen falls below the reference, that costs lambda times what it takes from the margin. The default
    is the paper's. Lambda stands within beta's bracket, as there.
    """
    fallen = torch.relu(-pairs.chosen_rewards)
    return -F.logsigmoid(pairs.margins - dpop_lambda * fallen)


def odpo(pairs: LossInputs, *, margin_scale: float = 1.0) -> Tensor:
    """ODPO (Amini et al. 2024, arXiv 2402.10571): -log s(margin - alpha (the data's margin)).

    ``margin_scale`` is the paper's alpha, 1 in its code too. The paper may take a log of the difference of
    scores first: then that log is what the data's margin must hold.
    """
    return -F.logsigmoid(pairs.margins - _wanted(pairs, margin_scale))


def rpo(pairs: LossInputs, *, margin_scale: float = 1.0) -> Tensor:
    """Reward-aware preference optimization (Nemotron-4 340B, arXiv 2406.11704): the KL between
    the preferences of the data's margin (a difference of ground-truth rewards) and of the policy.

    NeMo's `rpo_bwd_kl`; ``margin_scale`` is the paper's eta, NeMo's `gt_reward_scale`. What TRL calls RPO,
    DPO with cross-entropy of chosen, is `--loss-type sigmoid sft`.
    """
    found, wanted = pairs.margins, _wanted(pairs, margin_scale)
    of_chosen = torch.sigmoid(wanted) * (F.logsigmoid(wanted) - F.logsigmoid(found))
    of_rejected = torch.sigmoid(-wanted) * (F.logsigmoid(-wanted) - F.logsigmoid(-found))
    return of_chosen + of_rejected


def _wanted(pairs: LossInputs, margin_scale: float) -> Tensor:
    if pairs.data_margins is None:
        raise ValueError("this loss reads LossInputs.data_margins")
    return margin_scale * pairs.data_margins
