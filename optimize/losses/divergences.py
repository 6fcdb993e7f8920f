"""f-divergences in the place of DPO's reverse KL (Wang et al. 2023, arXiv 2309.16240).

Each function is f' at the ratio of policy to reference, given as its log. Where DPO has the log-ratio of a
completion, f-DPO has this score (theorem 1), up to a term that depends only on the prompt: so it may stand
only in losses of the difference of both completions. Constants are those of TRL 1.10 and later, so every
score is 0 where policy equals reference. Earlier versions left them out.

All take and return (pairs,) tensors.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Callable[[Tensor], Tensor]
"""(pairs,) log-ratios, in nats, to (pairs,) scores."""

LARGEST_EXPONENT = 80.0
"""exp(x) stays within float32 up to here. Beyond it a score is constant, and has no gradient."""


def reverse_kl(logratios: Tensor) -> Tensor:
    """DPO's own: f(t) = t log t, f'(t) = log t + 1, of which the 1 cancels."""
    return logratios


def forward_kl(logratios: Tensor) -> Tensor:
    """f(t) = -log t + t - 1, f'(t) = 1 - 1/t. TRL does not clamp it: from log-ratios of -88 on it is infinite
    there."""
    return -torch.expm1(torch.clamp(-logratios, max=LARGEST_EXPONENT))


def js_divergence(logratios: Tensor) -> Tensor:
    """Jensen-Shannon: f'(t) = log(2t / (t + 1)) (table 1), which never exceeds ln 2."""
    return math.log(2) + F.logsigmoid(logratios)


def alpha_divergence(logratios: Tensor, *, f_alpha_divergence_coef: float = 0.5) -> Tensor:
    """f'(t) = (t^(a - 1) - 1) / (a - 1), clamped as in TRL.

    This is TRL's a: 1 is the reverse KL and 0 the forward KL. The paper's alpha (table 1) is 1 - a, although
    TRL's help calls its own "the coefficient of u^-alpha"; at 0.5 the two are the same.

    Args:
        logratios: In nats.
        f_alpha_divergence_coef: TRL's a.
    """
    power = f_alpha_divergence_coef - 1
    if abs(power) < 1e-6:
        return reverse_kl(logratios)
    return torch.expm1(torch.clamp(power * logratios, max=LARGEST_EXPONENT)) / power
