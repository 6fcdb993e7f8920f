"""Log-probs of the scored tokens from hidden states, without ever holding all logits in fp32.

Only the rows that predict a completion token reach the head. They are projected one block at a time, and each
row is reduced to one number. Its derivatives with respect to the logits and to the hidden state are known at
once, whatever the loss will be: backward only multiplies them by a factor. The weight's gradient needs the
factors first. So the derivatives with respect to the logits are kept, in the dtype of the products' operands,
and the head takes three products. Rows that do not fit are projected again in backward, which is a fourth.

    S = scored tokens, d = hidden size, V = vocabulary
"""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_opt.optimize.forward.device_path import takes_gpu_path
from dpo_opt.optimize.forward.gradient_place import gradient_place
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
    kept: int
    """What is kept for backward."""


_ON_CPU = _Bytes(block=2**26, kept=2**29)
# In bf16 with 262,144 tokens, 8,192 rows are kept: a pair of two completions of 4,096 tokens.
_ON_GPU = _Bytes(block=2**28, kept=2**32)


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
        dtype: Compute dtype. In half precision a GPU multiplies on tensor cores. Logits and sums are fp32 all
            the same: logits in bf16 would be off by up to 0.06 nats. A CPU multiplies in fp32.
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
    operands = dtype if takes_gpu_path(hidden.device) else torch.float32
    logps: Tensor = _TokenLogps.apply(  # type: ignore[no-untyped-call]
        hidden,
        head.weight,
        head.bias,
        targets,
        head.scale,
        head.softcap,
        operands,
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
        narrow = weight.to(dtype) if of_hidden else weight
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
                towards_hidden.append(_product(derivatives, narrow))
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
                if place is not None:
                    weight.grad = place.addmm_(
                        derivatives.t(), states * factor, beta=int(weight.grad is place)
                    )
                elif of_weight:
                    weight_sum = _plus(weight_sum, _product(derivatives.t(), (states * factor).to(dtype)))
                if of_bias:
                    bias_sum = _plus(bias_sum, _product(derivatives.t(), factor.to(dtype)).squeeze(1))
        whole = weight_sum if place is None else place
        if ctx.tied is not None and whole is not None:
            ctx.tied.take(whole)
        # fp32 until here: hundreds of rows are added, and bf16 would lose the small ones.
        sums = ((hidden_sum, hidden), (weight_sum, weight), (bias_sum, bias))
        grads = (None if total is None else total.to(like.dtype) for total, like in sums)
        return *grads, None, None, None, None, None, None, None


class Projector:
    """Projects blocks of rows, and takes the derivatives. Holds the buffers of a block.

    In half precision, only the derivatives and what they are multiplied with are rounded to it. Logits are
    products of half-precision states and weights if that is what they are. Otherwise they are products in
    TF32, which moves log-probs by 0.001 nats (sd) where rounding to bf16 would move them by 0.008.
    """

    def __init__(self, hidden: Tensor, head: Head, dtype: torch.dtype) -> None:
        self._head = head
        self._dtype = dtype
        self._operands = dtype if hidden.dtype == head.weight.dtype == dtype else torch.float32
        self._weight = head.weight.to(self._operands)
        self._bytes = _ON_GPU if takes_gpu_path(hidden.device) else _ON_CPU
        self.rows = max(1, self._bytes.block // (4 * len(head.weight)))
        # The same memory for all blocks: new memory would have to be mapped and zeroed each time.
        shape = min(len(hidden), self.rows), len(head.weight)
        self._logits = torch.empty(shape, device=hidden.device, dtype=torch.float32)
        self._log_probs = torch.empty_like(self._logits)

    def room_to_keep(self, rows: int) -> Tensor:
        """Memory for the derivatives of the first rows: of all, or of the blocks that are not too much."""
        most = self._bytes.kept // (len(self._weight) * self._dtype.itemsize)
        kept = rows if rows <= most else most - most % self.rows
        return self._weight.new_empty(kept, len(self._weight), dtype=self._dtype)

    def log_probs(self, states: Tensor, *, out: Tensor | None = None) -> Tensor:
        """(rows, V) float32 log-probs of all tokens after each of a block's states.

        They are written to ``out``. Without it they last until the next block.
        """
        _, bias, scale, softcap = self._head
        logits = self._logits.narrow(0, 0, len(states))
        with contextlib.nullcontext() if self._dtype == torch.float32 else _tf32():
            _product(states.to(self._operands), self._weight.t(), out=logits)
        if bias is not None:
            logits += bias.float()
        if scale != 1.0:
            logits *= scale
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        found = self._log_probs.narrow(0, 0, len(states)) if out is None else out
        return torch.log_softmax(logits, -1, out=found)

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
        log_probs = self.log_probs(states, out=into if in_fp32 else None)
        if log_squares is not None:
            torch.log((2 * log_probs).exp_().sum(-1), out=log_squares)
        columns = targets.unsqueeze(1)
        logps = log_probs.gather(1, columns)
        if not differentiate:
            return logps.squeeze(1), None
        if into is None:
            into = log_probs if in_fp32 else torch.empty_like(log_probs, dtype=self._dtype)
        # softmax - onehot. Where the model is sure of the target, their difference is a small number.
        torch.exp(log_probs, out=into)
        into.scatter_(1, columns, torch.expm1(logps).to(into.dtype))
        if (softcap := self._head.softcap) is not None:
            logits = self._logits.narrow(0, 0, len(states))
            into.mul_(logits.div_(softcap).square_().neg_().add_(1))
        return logps.squeeze(1), into


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


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b`` in fp32, also of operands in half precision, which a GPU multiplies many times as fast."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    """A GPU multiplies fp32 numbers on its tensor cores, rounded to TF32, while the block runs."""
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)
