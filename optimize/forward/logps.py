"""Log-probs of the scored tokens from hidden states, without ever holding all logits.

Only the rows that predict a completion token reach the head. They are projected one tile at a time, and each
row is reduced to one number. Gradients need the tile again. If the loss of a pair depends only on that pair,
the loss is known as soon as the pair's rows are projected, and its gradients are computed at once. Otherwise
backward projects the rows a second time, which is a third more work.

    S = scored tokens, d = hidden size, V = vocabulary
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_opt.optimize.forward.logit_tiles import pair_blocks, tile_sizes, tiles, wide_rows


class Head(NamedTuple):
    """The last projection of a causal language model: logits = softcap(scale * (h W^T + b))."""

    weight: Tensor  # (V, d)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None


@dataclass(frozen=True, slots=True)
class Objective:
    """The loss that the caller will differentiate: a sum of terms, each a function of one pair's log-probs.

    With it, gradients are computed before the caller has computed the loss. ``backward`` compares the loss's
    gradient with the promised one, and refuses a different loss.
    """

    lengths: Sequence[int]
    """Scored rows of each pair, in order; they sum to S."""
    value: Callable[[Tensor, slice], Tensor]
    """Called with log-probs (rows of these pairs,) and the slice of pairs; returns the sum of their terms."""
    in_place: bool = False
    """Add an fp32 weight's gradient to ``weight.grad`` at once, without autograd and its hooks (FSDP). This
    saves a buffer of the weight's size. The caller must then call backward."""


@dataclass(frozen=True, slots=True)
class _Operands:
    """Some rows of hidden states, the head that projects them, and their target tokens."""

    hidden: Tensor
    head: Head
    targets: Tensor

    def rows(self, rows: slice) -> "_Operands":
        return _Operands(self.hidden[rows], self.head, self.targets[rows])


class _Gradients(NamedTuple):
    """Sums of gradients in fp32: hundreds of tiles are added, and bf16 would lose the small ones."""

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def rows(self, rows: slice) -> "_Gradients":
        return _Gradients(self.hidden[rows], self.weight, self.bias)

    def add(
        self, tile: Tensor, factor: Tensor, slope: Tensor | None, operands: _Operands, columns: slice
    ) -> None:
        """Add one tile's gradients to the sums. Overwrites ``tile``.

        Args:
            tile: (rows, columns), proportional to d loss / d logits.
            factor: (rows,) factor of each row. It multiplies the narrow side of every product, which saves a
                pass over the tile.
            slope: (rows, columns) derivative of the soft-cap.
            operands: The tile's rows.
            columns: The tile's part of the vocabulary.
        """
        if slope is not None:
            tile.mul_(slope)
        factor = factor * operands.head.scale
        self.hidden.add_((tile @ operands.head.weight[columns].float()).mul_(factor[:, None]))
        if self.weight is not None:
            self.weight[columns].addmm_(tile.T, operands.hidden.float() * factor[:, None])
        if self.bias is not None:
            self.bias[columns] += factor @ tile

    def rounded(self, like: tuple[Tensor, Tensor | None, Tensor | None]) -> tuple[Tensor | None, ...]:
        """The gradients in the dtypes of the inputs; None for an input that needs none."""
        pairs = zip(self, like, strict=True)
        return tuple(None if g is None or x is None else g.to(x.dtype) for g, x in pairs)


def token_logps(hidden: Tensor, head: Head, targets: Tensor, *, objective: Objective | None = None) -> Tensor:
    """Log-prob, in nats, of each target.

    Args:
        hidden: (S, d) states that predict the targets.
        head: The model's head; its weight may require grad.
        targets: (S,) token ids.
        objective: The loss that the caller will differentiate, if it is a sum over pairs. It saves a quarter
            of the head's work: gradients are computed here and returned in backward.

    Returns:
        (S,) float32.

    Raises:
        RuntimeError: A target has no row in the head; in backward: the loss is not the objective.
        ValueError: The objective's lengths do not sum to the number of targets.
    """
    if objective is not None and sum(objective.lengths) != len(targets):
        raise ValueError(f"the objective is about {sum(objective.lengths)} tokens, not {len(targets)}")
    # An asynchronous assertion: the CPU does not wait for the GPU.
    known = ((targets >= 0) & (targets < head.weight.shape[0])).all()
    torch._assert_async(known, f"a token to be scored is not among the head's {head.weight.shape[0]}")
    logps: Tensor = _TokenLogps.apply(  # type: ignore[no-untyped-call]
        hidden,
        head.weight,
        head.bias,
        targets,
        head.scale,
        head.softcap,
        objective if torch.is_grad_enabled() else None,
    )
    return logps


class _TokenLogps(torch.autograd.Function):
    """log softmax(logits)[target], row by row.

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
        objective: Objective | None,
    ) -> Tensor:
        ctx.settings = scale, softcap
        if not any(ctx.needs_input_grad):
            objective = None
        ctx.has_gradients = objective is not None
        operands = _Operands(hidden, Head(weight, bias, scale, softcap), targets)
        if objective is None:
            logps, log_z = _project(operands)
            ctx.save_for_backward(hidden, weight, bias, targets, log_z)
            return logps
        in_place = objective.in_place and weight.is_leaf and weight.dtype == torch.float32
        if in_place and weight.requires_grad and weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        gradients = _zeros(ctx, operands, weight_gradient=weight.grad if in_place else None)
        logps = torch.empty(len(targets), device=hidden.device, dtype=torch.float32)
        dloss_dlogps = torch.empty_like(logps)
        # One tile for all blocks: new memory would have to be mapped and zeroed each time.
        tile = logps.new_empty(
            min(wide_rows(hidden, vocabulary=weight.shape[0]), len(targets)), weight.shape[0]
        )
        for pairs, rows in pair_blocks(objective.lengths, hidden, vocabulary=weight.shape[0]):
            logps[rows], dloss_dlogps[rows] = _project_and_differentiate(
                operands.rows(rows),
                functools.partial(_value_of, objective, pairs),
                gradients.rows(rows),
                tile,
            )
        ctx.save_for_backward(dloss_dlogps)
        # Not saved with save_for_backward: with no other owner, autograd takes them without a copy.
        ctx.gradients = gradients.rounded((hidden, None if in_place else weight, bias))
        return logps

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        if ctx.has_gradients:
            (dloss_dlogps,) = ctx.saved_tensors
            kept = torch.isclose(grad, dloss_dlogps, rtol=1e-4, atol=1e-12, equal_nan=True).all()
            torch._assert_async(kept, "the loss that is differentiated is not the promised objective")
            gradients, ctx.gradients = ctx.gradients, None
            return (*gradients, None, None, None, None)
        hidden, weight, bias, targets, log_z = ctx.saved_tensors
        operands = _Operands(hidden, Head(weight, bias, *ctx.settings), targets)
        gradients = _zeros(ctx, operands)
        _differentiate(operands, log_z, grad.float(), gradients)
        grads = gradients.rounded((hidden, weight, bias))
        return (*grads, None, None, None, None)


def _zeros(ctx: Any, operands: _Operands, *, weight_gradient: Tensor | None = None) -> _Gradients:
    """Sums that start at zero, except the weight's if ``weight_gradient`` is given."""
    needed = ctx.needs_input_grad
    weight, bias = operands.head.weight, operands.head.bias
    if weight_gradient is None and needed[1]:
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32)
    return _Gradients(
        torch.zeros_like(operands.hidden, dtype=torch.float32),
        weight_gradient,
        torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needed[2] else None,
    )


def _project(operands: _Operands) -> tuple[Tensor, Tensor]:
    """Log-probs, and the log of each row's sum of exp(logits) over the vocabulary; both (rows,)."""
    target_logits = torch.full(
        (len(operands.targets),), torch.nan, device=operands.hidden.device, dtype=torch.float32
    )
    log_z = torch.full_like(target_logits, -torch.inf)
    for rows, columns in tiles(operands.hidden, vocabulary=operands.head.weight.shape[0]):
        tile = _logits(operands.rows(rows), columns)
        inside, column = _target_columns(operands.targets[rows], columns)
        target_logits[rows] = torch.where(
            inside, tile.gather(1, column[:, None]).squeeze(1), target_logits[rows]
        )
        largest, sums = _exponentials(tile)
        log_z[rows] = torch.logaddexp(log_z[rows], sums.log_().add_(largest))
    return target_logits - log_z, log_z


def _differentiate(operands: _Operands, log_z: Tensor, upstream: Tensor, gradients: _Gradients) -> None:
    """Add the gradients of the log-probs that ``_project`` returned; computes the tiles again."""
    for rows, columns in tiles(operands.hidden, vocabulary=operands.head.weight.shape[0]):
        part = operands.rows(rows)
        tile = _logits(part, columns)
        slope = _softcap_slope(tile, operands.head.softcap)
        tile.sub_(log_z[rows, None]).exp_()
        inside, column = _target_columns(part.targets, columns)
        tile.scatter_add_(1, column[:, None], -inside.float()[:, None])
        gradients.rows(rows).add(tile, -upstream[rows], slope, part, columns)


def _project_and_differentiate(
    operands: _Operands, value: Callable[[Tensor], Tensor], gradients: _Gradients, tile: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probs of whole pairs and the derivatives of their terms, both (rows,). Adds the gradients.

    ``tile`` is a buffer for rows over the whole vocabulary.
    """
    whole = slice(0, operands.head.weight.shape[0])
    if len(operands.targets) > len(tile):
        # A single pair with more rows than the tile.
        logps, log_z = _project(operands)
        dloss_dlogps = _dloss_dlogps(logps, value)
        _differentiate(operands, log_z, dloss_dlogps, gradients)
        return logps, dloss_dlogps
    tile = _logits(operands, whole, out=tile[: len(operands.targets)])
    slope = _softcap_slope(tile, operands.head.softcap)
    columns = operands.targets[:, None]
    target_logits = tile.gather(1, columns).squeeze(1)
    step = tile_sizes(tile).wide_rows
    parts = [_exponentials(tile[i : i + step]) for i in range(0, len(tile), step)]
    largest, sums = (torch.cat(column) for column in zip(*parts, strict=True))
    logps = target_logits - largest - sums.log()
    dloss_dlogps = _dloss_dlogps(logps, value)
    # Not divided by the sums here: each row's factor does that.
    tile.scatter_add_(1, columns, -sums[:, None])
    gradients.add(tile, -dloss_dlogps / sums, slope, operands, whole)
    return logps, dloss_dlogps


def _value_of(objective: Objective, pairs: slice, logps: Tensor) -> Tensor:
    return objective.value(logps, pairs)


def _dloss_dlogps(logps: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
    """d value / d logps, (rows,)."""
    with torch.enable_grad():
        leaf = logps.detach().requires_grad_()
        (dloss_dlogps,) = torch.autograd.grad(value(leaf), leaf)
    return dloss_dlogps


def _exponentials(tile: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's largest entry and sum of exp(entry - largest). Overwrites the tile with the exponentials.

    In place, so that the tile stays in the cache.
    """
    # Where every logit of a part is -inf, the part contributes nothing.
    largest = tile.amax(dim=-1).clamp_(min=torch.finfo(torch.float32).min)
    return largest, tile.sub_(largest[:, None]).exp_().sum(dim=-1)


def _target_columns(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Which targets are among these columns, and at which of them (any column for the others)."""
    column = targets - columns.start
    width = columns.stop - columns.start
    return (column >= 0) & (column < width), column.clamp(0, width - 1)


def _logits(operands: _Operands, columns: slice, out: Tensor | None = None) -> Tensor:
    """One fp32 tile of logits, (rows, columns)."""
    weight, bias, scale, softcap = operands.head
    tile = torch.mm(operands.hidden.float(), weight[columns].float().T, out=out)
    if bias is not None:
        tile += bias[columns].float()
    if scale != 1.0:
        tile *= scale
    if softcap is not None:
        tile.div_(softcap).tanh_().mul_(softcap)
    return tile


def _softcap_slope(logits: Tensor, softcap: float | None) -> Tensor | None:
    return None if softcap is None else 1 - (logits / softcap) ** 2
