"""Attention written out, for what no fused kernel of torch computes: soft-capped scores, and sinks.

Only one segment's scores are in memory at a time: the backward computes them again.

    H = query heads, K = key-value heads, D = head dimension, R = queries, S = keys
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def written_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention output (1, H, R, D) of queries over keys.

    Args:
        query: (1, H, R, D).
        key: (1, K, S, D).
        value: (1, K, S, D).
        mask: (R, S) bool or with leading dimensions, true if a query sees a key; None: all see all.
        scale: Factor of the scores; None: 1 / sqrt(D).
        softcap: Scores s become softcap * tanh(s / softcap), as in Gemma 2 (arXiv 2408.00118, section 2).
        sinks: (H,) One more score for each head, which takes its share of the softmax and has no value, as in
            gpt-oss.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    given = (query, key, value, mask, factor, softcap, sinks)
    output: Tensor = checkpoint(_attend, *given, use_reentrant=False, preserve_rng_state=False)
    return output


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    if query.shape[1] != key.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.float()
    if mask is not None:
        # Not minus infinity: a row of padding may see nothing, and would be NaN in the backward.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is None:
        shares = torch.softmax(scores, dim=-1)
    else:
        extra = sinks.float().view(1, -1, 1, 1).expand(len(scores), -1, scores.shape[2], 1)
        shares = torch.softmax(torch.cat([scores, extra], dim=-1), dim=-1)[..., :-1]
    return torch.matmul(shares.to(value.dtype), value)
