"""Compares what two models say at each token of sampled completions, over the whole vocabulary.

A sampled token says how likely it is under both models. All tokens that could have stood in its place say
more: their KL is known exactly, and has the same mean (Rao-Blackwell; Amini et al., arXiv 2504.10637). Only
hidden states and heads are needed for it, so that the two models are never in memory together.

    C = tokens of a completion, S = tokens of a block, d = hidden size, V = vocabulary
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_opt.optimize.forward.logps import Head, Projector
from dpo_opt.optimize.forward.precision import full_precision_products
from dpo_opt.schemas.pairs import IdArray, LogpArray

# Most tokens of a block; a large vocabulary takes fewer.
_ROWS = 4096


class States(NamedTuple):
    """One model at the N tokens of some completions: enough for all its next-token distributions."""

    hidden: Tensor
    """(N, d), on the CPU: the states that predict the tokens, one completion after the other."""
    head: Head
    dtype: torch.dtype
    """What the model computes in."""


class NextTokens(NamedTuple):
    """Two models at the tokens of a completion that the first one sampled; each (C,) float32, in nats."""

    policy_logps: LogpArray
    ref_logps: LogpArray
    policy_entropies: LogpArray
    """Entropy of the policy's next-token distribution: the mean of minus the log-prob of what it samples."""
    kl: LogpArray | None = None
    """KL(policy || reference) of the next-token distributions; None where the vocabularies differ in size."""


@torch.no_grad()
def compare_next_tokens(
    policy: States, reference: States, completions: Sequence[IdArray]
) -> list[NextTokens]:
    """Log-probs, entropies and exact next-token KL at each token.

    Args:
        policy: The model that sampled the completions.
        reference: The other model, at the same tokens.
        completions: (C,) token ids each.
    """
    targets = torch.from_numpy(np.concatenate(completions)).long()
    projectors = [_projector(states) for states in (policy, reference)]
    rows = min(_ROWS, *(projector.rows for projector in projectors))
    blocks = []
    with full_precision_products():
        for at in range(0, len(targets), rows):
            own, other = (
                projector.log_probs(states.hidden[at : at + rows].to(states.head.weight.device))
                for projector, states in zip(projectors, (policy, reference), strict=True)
            )
            blocks.append(_compared(own, other, targets[at : at + rows]))
    values = torch.cat(blocks, dim=1).numpy()
    ends = np.cumsum([len(ids) for ids in completions])[:-1]
    return [NextTokens(*part) for part in np.split(values, ends, axis=1)]


def _projector(states: States) -> Projector:
    like = states.hidden[:_ROWS].to(states.head.weight.device)
    return Projector(like, states.head, states.dtype)


def _compared(own: Tensor, other: Tensor, targets: Tensor) -> Tensor:
    """(3 or 4, S) on the CPU: the fields of ``NextTokens`` at a block's tokens.

    Args:
        own: (S, V) the policy's log-probs of all tokens.
        other: (S, V) those of the reference.
        targets: (S,) the sampled tokens.
    """
    columns = targets.to(own.device).unsqueeze(1)
    probs = own.exp()
    values = [own.gather(1, columns).squeeze(1), other.gather(1, columns).squeeze(1), -(probs * own).sum(-1)]
    if own.shape == other.shape:
        values.append((probs * (own - other)).sum(-1))
    return torch.stack(values).cpu()
