"""torch's ``varlen_attn`` written out: one masked softmax per segment, on any device, in any dtype."""

import torch
from torch import Tensor


def written_out(
    query: Tensor,  # (T, H, D)
    key: Tensor,  # (N, K, D)
    value: Tensor,  # (N, K, D)
    cu_seq_q: Tensor,  # (segments + 1,)
    cu_seq_k: Tensor,  # (segments + 1,)
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """(T, H, D): what torch documents, with the causal diagonal at the bottom right."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert isinstance(max_q, int)
    assert isinstance(max_k, int)
    assert max_q == int(cu_seq_q.diff().max())
    assert max_k == int(cu_seq_k.diff().max())
    assert (cu_seq_q[0], cu_seq_q[-1]) == (0, len(query))
    assert (cu_seq_k[0], cu_seq_k[-1]) == (0, len(key))
    left, right = window_size
    assert right == 0
    repeat = query.shape[1] // key.shape[1]
    outputs = []
    q_starts, k_starts = cu_seq_q.tolist(), cu_seq_k.tolist()
    for i in range(len(q_starts) - 1):
        q = query[q_starts[i] : q_starts[i + 1]]
        k = key[k_starts[i] : k_starts[i + 1]].repeat_interleave(repeat, dim=1)
        v = value[k_starts[i] : k_starts[i + 1]].repeat_interleave(repeat, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        at = torch.arange(len(q), device=q.device)[:, None] + len(k) - len(q)
        keys = torch.arange(len(k), device=q.device)[None]
        seen = keys <= at
        if left >= 0:
            seen &= keys >= at - left
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)
