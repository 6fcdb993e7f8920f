"""Log-probs of the scored tokens from hidden states, without ever holding all logits in fp32.

Only the rows that predict a completion token reach the head. They are projected one block at a time, and each
row is reduced to one number. Its derivatives with respect to the logits and to the hidden state are known at
once, whatever the loss will be: backward only multiplies them by a factor. The weight's gradient needs the
factors first. So the derivatives with respect to the logits are kept, in the dtype of the products' operands,
and the head takes three products. Rows that do not fit are projected again in backward, which is a fourth.

    S = scored tokens, d = hidden size, V = vocabulary
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_opt.optimize.forward.device_path import takes_gpu_path
from dpo_opt.optimize.forward.gradient_place import add_product, gradient_place
from dpo_opt.optimize.forward.head_products import (
    add_towards_weight,
    gradient_operands,
    logit_operands,
    project,
    towards_states,
)
from dpo_opt.optimize.forward.tied_gradients import TiedRows


class Head(NamedTuple):
    """The last projection of a causal language model: logits = softcap(scale * (h W^T + b))."""

    weight: Tensor  # (V, d)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None


class _Bytes(NamedTuple):
    """Most memory of a head."""

    block: int
    """A block's logits. Products of fewer than about 50 rows are slow, of more than 500 no faster."""
    part: int
    """The log-probs that a block's logits become at a time. A CPU's stay in its cache."""
    kept: int
    """What is kept for backward."""


_ON_CPU = _Bytes(block=2**26, part=2**22, kept=2**29)
# In bf16 with 262,144 tokens, 8,192 rows are kept: a pair of two completions of 4,096 tokens.
_ON_GPU = _Bytes(block=2**28, part=2**28, kept=2**32)


def token_logps(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    log_squares: Tensor | None = None,
    tied: TiedRows | None = None,
) -> Tensor:
    """Log-prob, in nats, of each target.

    Args:
        hidden: (S, d) states that predict the targets.
        head: The model's head; its weight may require grad.
        targets: (S,) token ids.
        dtype: Compute dtype. In half precision a GPU multiplies on tensor cores, and a CPU that multiplies
            bfloat16 computes gradients in it. Logits and sums are fp32 all the same: logits in bf16 would be
            off by up to 0.06 nats.
        log_squares: (S,) float32 that is filled with the log of each row's sum of squared probabilities; it
            takes another block's memory. None: they are not computed.
        tied: Takes over a part of the weight's gradient, for the embedding that has the same weight.

    Returns:
        (S,) float32.

    Raises:
        RuntimeError: A target has no row in the head.
    """
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
        dtype,
        torch.is_grad_enabled(),
        log_squares,
        tied,
    )
    return logps


class _TokenLogps(torch.autograd.Function):
    """log softmax(logits)[target], row by row."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        dtype: torch.dtype,
        differentiable: bool,
        log_squares: Tensor | None,
        tied: TiedRows | None,
    ) -> Tensor:
        ctx.settings = scale, softcap, dtype
        ctx.tied = tied
        of_hidden, of_weight, of_bias = (differentiable and need for need in ctx.needs_input_grad[:3])
        projector = Projector(hidden, Head(weight, bias, scale, softcap), dtype)
        kept = projector.room_to_keep(len(targets) if of_weight or of_bias else 0)
        room = torch.split(kept, projector.rows) if len(kept) else ()
        narrow = weight.to(kept.dtype) if of_hidden else weight
        squares = () if log_squares is None else torch.split(log_squares, projector.rows)
        logps, towards_hidden = [], []
        for states, tokens, into, squared in itertools.zip_longest(
            torch.split(hidden, projector.rows), torch.split(targets, projector.rows), room, squares
        ):
            found, derivatives = projector.project(
                states, tokens, into=into, differentiate=of_hidden or into is not None, log_squares=squared
            )
            logps.append(found)
            if of_hidden and derivatives is not None:
                towards_hidden.append(towards_states(derivatives, narrow))
        ctx.save_for_backward(
            hidden, weight, bias, targets, kept, torch.cat(towards_hidden) if of_hidden else None
        )
        return torch.cat(logps)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, kept, towards_hidden = ctx.saved_tensors
        scale, softcap, dtype = ctx.settings
        _, of_weight, of_bias, *_ = ctx.needs_input_grad
        factors = (grad * -scale).unsqueeze(1)
        hidden_sum = None if towards_hidden is None else towards_hidden * factors
        weight_sum = bias_sum = None
        place = gradient_place(weight) if of_weight else None
        if of_weight or of_bias:
            head = Head(weight, bias, scale, softcap)
            for derivatives, states, factor in _derivatives(head, hidden, targets, kept, factors, dtype):
                narrow = derivatives.dtype
                if place is not None:
                    add_product(weight, derivatives.t(), (states * factor).to(narrow))
                elif of_weight:
                    weight_sum = add_towards_weight(weight_sum, derivatives, (states * factor).to(narrow))
                if of_bias:
                    bias_sum = add_towards_weight(bias_sum, derivatives, factor.to(narrow))
        whole = weight_sum if place is None else place
        if ctx.tied is not None and whole is not None:
            ctx.tied.take(whole)
        # fp32 until here: hundreds of rows are added, and bf16 would lose the small ones.
        sums = ((hidden_sum, hidden), (weight_sum, weight), (bias_sum, bias))
        grads = (None if total is None else total.view_as(like).to(like.dtype) for total, like in sums)
        return *grads, None, None, None, None, None, None, None


class Projector:
    """Projects blocks of rows, and takes the derivatives. Holds the buffers of a block.

    In half precision, only the derivatives and what they are multiplied with are rounded to it. A GPU's
    logits are products of half-precision states and weights if that is what they are. Otherwise they are
    products in TF32, which moves log-probs by 0.001 nats (sd) where bf16 would move them by 0.008.
    """

    def __init__(self, hidden: Tensor, head: Head, dtype: torch.dtype) -> None:
        on_gpu = takes_gpu_path(hidden.device)
        self._head = head
        self._dtype = gradient_operands(dtype, hidden.device)
        self._operands = logit_operands(dtype, hidden, head.weight)
        self._tf32 = on_gpu and dtype != torch.float32
        self._weight = head.weight.to(self._operands) if on_gpu else head.weight
        self._bytes = _ON_GPU if on_gpu else _ON_CPU
        most = max(1, self._bytes.block // (4 * len(head.weight)))
        # Blocks of one size: products of the few rows that a last one would have are slow.
        count = max(1, len(hidden))
        self.rows = math.ceil(count / math.ceil(count / most))
        self._part = max(1, self._bytes.part // (4 * len(head.weight)))
        # The same memory for all blocks: new memory would have to be mapped and zeroed each time. What is not
        # written takes none.
        self._logits = torch.empty(self.rows, len(head.weight), device=hidden.device, dtype=torch.float32)
        self._log_probs = torch.empty_like(self._logits.narrow(0, 0, min(self.rows, self._part)))

    def room_to_keep(self, rows: int) -> Tensor:
        """Memory for the derivatives of the first rows: of all, or of the blocks that are not too much."""
        most = self._bytes.kept // (len(self._weight) * self._dtype.itemsize)
        kept = rows if rows <= most else most - most % self.rows
        return self._weight.new_empty(kept, len(self._weight), dtype=self._dtype)

    def log_probs(self, states: Tensor) -> Tensor:
        """(rows, V) float32 log-probs of all tokens after each of a block's states."""
        return torch.log_softmax(self._scaled_logits(states, self._logits.narrow(0, 0, len(states))), -1)

    def project(
        self,
        states: Tensor,
        targets: Tensor,
        *,
        into: Tensor | None,
        differentiate: bool,
        log_squares: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs of a block, (rows,), and minus their derivatives with respect to the scaled logits.

        The derivatives, (rows, V), are written to ``into``. Without it they last until the next block.
        """
        in_fp32 = self._dtype == torch.float32
        # In fp32 the derivatives take the place of their logits.
        logits = into if in_fp32 and into is not None else self._logits.narrow(0, 0, len(states))
        self._scaled_logits(states, logits)
        if into is None and differentiate:
            into = logits if in_fp32 else torch.empty_like(logits, dtype=self._dtype)
        logps = torch.empty_like(targets, dtype=torch.float32)
        given = (logits, targets, logps, into if differentiate else None, log_squares)
        parts = (itertools.repeat(None) if t is None else torch.split(t, self._part) for t in given)
        for rows, tokens, found, derivatives, squared in zip(*parts, strict=False):
            log_probs = self._log_probs.narrow(0, 0, len(rows))
            torch.log_softmax(rows, -1, out=log_probs)
            torch.gather(log_probs, 1, tokens.unsqueeze(1), out=found.unsqueeze(1))
            if squared is not None:
                torch.log((2 * log_probs).exp_().sum(-1), out=squared)
            if derivatives is not None:
                self._differentiate(rows, log_probs, tokens, found, into=derivatives)
        return logps, into if differentiate else None

    def _scaled_logits(self, states: Tensor, out: Tensor) -> Tensor:
        """``out``, (rows, V) float32, with the logits of (rows, d) states."""
        _, bias, scale, softcap = self._head
        project(states.to(self._operands), self._weight, out=out, tf32=self._tf32)
        if bias is not None:
            out += bias.float()
        if scale != 1.0:
            out *= scale
        if softcap is not None:
            out.div_(softcap).tanh_().mul_(softcap)
        return out

    def _differentiate(
        self, logits: Tensor, log_probs: Tensor, targets: Tensor, logps: Tensor, *, into: Tensor
    ) -> None:
        """Write softmax - onehot, through the soft cap, to ``into``, which may lie where the logits do."""
        columns = targets.unsqueeze(1)
        # Where the model is sure of the target, the difference is a small number.
        of_targets = torch.expm1(logps).unsqueeze(1)
        softcap = self._head.softcap
        # A CPU's kernels would write another dtype by way of two large copies.
        at_once = softcap is None and (into.dtype == torch.float32 or takes_gpu_path(into.device))
        found = torch.exp(log_probs, out=into if at_once else log_probs)
        found.scatter_(1, columns, of_targets.to(found.dtype))
        if softcap is not None:
            found *= logits.div_(softcap).square_().neg_().add_(1)
        if not at_once:
            into.copy_(found)


def _derivatives(
    head: Head, hidden: Tensor, targets: Tensor, kept: Tensor, factors: Tensor, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of some rows at a time the kept derivatives or those of another projection, the states and factors."""
    rest = len(hidden) - len(kept)
    if len(kept):
        yield kept, hidden.narrow(0, 0, len(kept)), factors.narrow(0, 0, len(kept))
    if not rest:
        return
    hidden, targets, factors = (t.narrow(0, len(kept), rest) for t in (hidden, targets, factors))
    projector = Projector(hidden, head, dtype)
    blocks = (torch.split(t, projector.rows) for t in (hidden, targets, factors))
    for states, tokens, factor in zip(*blocks, strict=True):
        _, derivatives = projector.project(states, tokens, into=None, differentiate=True)
        assert derivatives is not None
        yield derivatives, states, factor
