"""Hidden states to log-probs of the scored tokens, without ever holding the logits.

Only the rows that predict a completion token reach the head; they are projected a tile at a time, each on a
part of the vocabulary, reduced to one number per token, and projected again in backward.

    S = scored tokens, d = hidden size, V = vocabulary
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Entries of a tile: on a CPU (False) it stays in the last-level cache, on a GPU (True) it fills the device.
_TILE_ENTRIES = {False: 2**22, True: 2**26}
_TILE_ROWS = 1024


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
        chosen = torch.empty(len(targets), device=hidden.device, dtype=torch.float32)
        log_z = torch.full_like(chosen, -torch.inf)
        for rows, columns in _tiles(hidden, weight):
            tile = _logits(hidden[rows], weight[columns], _part(bias, columns), scale, softcap)
            inside, place = _places(targets[rows], columns)
            chosen[rows] = torch.where(inside, tile.gather(1, place[:, None]).squeeze(1), chosen[rows])
            # In place: the tile is read several times, and shall stay in the cache.
            # Where every logit of a part is -inf, the part adds nothing.
            largest = tile.amax(dim=-1).clamp_(min=torch.finfo(torch.float32).min)
            part = tile.sub_(largest[:, None]).exp_().sum(dim=-1).log_().add_(largest)
            log_z[rows] = torch.logaddexp(log_z[rows], part)
        ctx.save_for_backward(hidden, weight, bias, targets, log_z)
        ctx.settings = scale, softcap
        return chosen - log_z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_z = ctx.saved_tensors
        scale, softcap = ctx.settings
        # fp32: hundreds of tiles are added up, and bf16 would drop the small ones.
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for rows, columns in _tiles(hidden, weight):
            tile = _logits(hidden[rows], weight[columns], _part(bias, columns), scale, softcap)
            slope = None if softcap is None else 1 - (tile / softcap) ** 2
            upstream = grad[rows].float()
            tile = tile.sub_(log_z[rows, None]).exp_().mul_(-upstream[:, None])
            inside, place = _places(targets[rows], columns)
            tile.scatter_add_(1, place[:, None], torch.where(inside, upstream, 0)[:, None])
            if slope is not None:
                tile.mul_(slope)
            if grad_bias is not None:
                grad_bias[columns] += scale * tile.sum(0)
            if scale != 1.0:
                tile.mul_(scale)
            grad_hidden[rows].addmm_(tile, weight[columns].float())
            if grad_weight is not None:
                grad_weight[columns].addmm_(tile.T, hidden[rows].float())
        return (
            grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _tiles(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and vocabulary of each tile: many rows and few columns, so that the product runs at full speed."""
    tile = _TILE_ENTRIES[hidden.device.type == "cuda"]
    rows = max(1, min(len(hidden), _TILE_ROWS, tile))
    columns = max(1, tile // rows)
    for i in range(0, len(hidden), rows):
        for j in range(0, weight.shape[0], columns):
            yield slice(i, i + rows), slice(j, j + columns)


def _places(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Which targets stand in these columns, and where (any place for the others)."""
    place = targets - columns.start
    width = columns.stop - columns.start
    return (place >= 0) & (place < width), place.clamp(0, width - 1)


def _part(bias: Tensor | None, columns: slice) -> Tensor | None:
    return None if bias is None else bias[columns]


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """One fp32 tile of logits, (rows, columns)."""
    tile = hidden.float() @ weight.float().T
    if bias is not None:
        tile += bias.float()
    if scale != 1.0:
        tile *= scale
    if softcap is not None:
        tile = torch.tanh(tile / softcap) * softcap
    return tile
