"""Hidden states to log-probs of the scored tokens, without ever holding the logits.

Only the rows that predict a completion token reach the head; they are projected a tile at a time,
reduced to one number per token, and projected again in backward. Peak memory is one (c, V) tile.

    S = scored tokens, d = hidden size, V = vocabulary, c = rows of a tile
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Big enough that the matrix product dominates, small next to the activations.
_TILE_BYTES = 256 * 2**20


class Head(NamedTuple):
    """The last projection of a causal language model: logits = softcap(scale * (h W^T + b))."""

    weight: Tensor  # (V, d)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None


def token_logps(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Log-prob, in nats, of each target.

    Args:
        hidden: (S, d) states that predict the targets.
        head: The model's head; its weight may require grad.
        targets: (S,) token ids.

    Returns:
        (S,) float32.
    """
    logps: Tensor = _TokenLogps.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, targets, head.scale, head.softcap
    )
    return logps


class _TokenLogps(torch.autograd.Function):
    """log softmax(logits)[target], row by row; logits are recomputed in backward.

    d logp / d logits = onehot(target) - softmax(logits).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        rows = max(1, _TILE_BYTES // (4 * weight.shape[0]))
        logps = torch.empty(len(targets), device=hidden.device, dtype=torch.float32)
        log_z = torch.empty_like(logps)
        weight32 = weight.float()
        for i in range(0, len(targets), rows):
            chunk = slice(i, i + rows)
            tile = _logits(hidden[chunk], weight32, bias, scale, softcap)
            log_z[chunk] = torch.logsumexp(tile, dim=-1)
            logps[chunk] = tile.gather(1, targets[chunk, None]).squeeze(1) - log_z[chunk]
        ctx.save_for_backward(hidden, weight, bias, targets, log_z)
        ctx.settings = rows, scale, softcap
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_z = ctx.saved_tensors
        rows, scale, softcap = ctx.settings
        weight32 = weight.float()
        grad_hidden = torch.empty_like(hidden)
        # fp32: hundreds of tiles are added up, and bf16 would drop the small ones.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for i in range(0, len(targets), rows):
            chunk = slice(i, i + rows)
            tile = _logits(hidden[chunk], weight32, bias, scale, softcap)
            slope = None if softcap is None else 1 - (tile / softcap) ** 2
            upstream = grad[chunk].float()
            tile = tile.sub_(log_z[chunk, None]).exp_().mul_(-upstream[:, None])
            tile.scatter_add_(1, targets[chunk, None], upstream[:, None])
            if slope is not None:
                tile.mul_(slope)
            if grad_bias is not None:
                grad_bias += scale * tile.sum(0)
            tile.mul_(scale)
            grad_hidden[chunk] = (tile @ weight32).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(tile.T, hidden[chunk].float())
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _logits(
    hidden: Tensor, weight32: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """One fp32 tile of logits, (c, V)."""
    tile = hidden.float() @ weight32.T
    if bias is not None:
        tile += bias.float()
    if scale != 1.0:
        tile *= scale
    if softcap is not None:
        tile = torch.tanh(tile / softcap) * softcap
    return tile
