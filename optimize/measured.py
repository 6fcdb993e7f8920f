"""From token log-probs of sequences to the numbers of pairs that losses are made of."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_opt.optimize.forward.packing import to_device
from dpo_opt.schemas.pairs import ScoredPair, counted


class Measured(NamedTuple):
    """What the policy says of pairs: all (pairs,) float64."""

    chosen_logps: Tensor
    """Sums over each completion, in nats."""
    rejected_logps: Tensor
    chosen_weighed: Tensor
    """The sums that losses see: with ``ld_alpha`` the tokens beyond the shorter completion count less."""
    rejected_weighed: Tensor
    agreement: Tensor | None
    """WPO's weight of each pair, without gradient; None without weighting."""


def measure(
    logps: Tensor,
    lengths: Sequence[int],
    sides: Sequence[tuple[int, int]],
    *,
    ld_alpha: float | None = None,
    log_squares: Tensor | None = None,
) -> Measured:
    """Sums of each pair's two sequences, which other pairs may share.

    Args:
        logps: (S,) log-probs of the scored tokens of all sequences, one after the other.
        lengths: Scored tokens of each sequence.
        sides: Of each pair, which sequences are chosen and rejected.
        ld_alpha: LD-DPO's alpha (Liu et al. 2024, arXiv 2409.06411): weight of a completion's tokens beyond
            the length of the other. None: 1. As in TRL; LLaMA-Factory and ms-swift leave the reference as it
            is.
        log_squares: (S,) log of the sum of all tokens' squared probabilities, in each token's place. With it
            pairs are weighed by WPO (Zhou et al. 2024, arXiv 2406.11827, eq. 2), as in TRL: e to the mean of
            log p - log sum p^2 over each completion, the product of both.
    """
    counts = to_device(torch.tensor(lengths), logps.device)
    # Their sum is known here, so a GPU is not waited for.
    owners = torch.repeat_interleave(counts, output_size=sum(lengths))
    # float64: a margin is a small difference of sums over hundreds of tokens.
    zeros = logps.new_zeros(len(lengths), dtype=torch.float64)
    sums = zeros.index_add(0, owners, logps.double())
    chosen, rejected = to_device(torch.tensor(sides), logps.device).unbind(1)
    totals = sums.index_select(0, chosen), sums.index_select(0, rejected)
    weighed, agreement = totals, None
    if ld_alpha is not None:
        before = F.pad(logps.double().cumsum(0), (1, 0))
        first = counts.cumsum(0) - counts
        shared = torch.minimum(counts[chosen], counts[rejected])
        heads = (before[first[side] + shared] - before[first[side]] for side in (chosen, rejected))
        one, other = (
            ld_alpha * total + (1 - ld_alpha) * head for total, head in zip(totals, heads, strict=True)
        )
        weighed = one, other
    if log_squares is not None:
        aligned = zeros.index_add(0, owners, logps.detach().double() - log_squares.double()) / counts
        agreement = torch.exp(aligned[chosen] + aligned[rejected])
    return Measured(*totals, *weighed, agreement)


def reference_sums(pair: ScoredPair, ld_alpha: float | None) -> tuple[float, float]:
    """The reference's chosen and rejected sums as losses see them, in nats. See ``measure``."""
    if ld_alpha is None:
        return pair.ref_chosen_logps, pair.ref_rejected_logps
    chosen, rejected = (
        counted(values, mask).astype(np.float64)
        for values, mask in (
            (pair.ref_chosen_token_logps, pair.chosen_mask),
            (pair.ref_rejected_token_logps, pair.rejected_mask),
        )
    )
    shared = min(len(chosen), len(rejected))
    one, other = (float(s[:shared].sum() + ld_alpha * s[shared:].sum()) for s in (chosen, rejected))
    return one, other
