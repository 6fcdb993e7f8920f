"""The three products of a head, each the way its device is fast at it. Sums of them are fp32.

A GPU multiplies operands in half precision on its tensor cores, and returns fp32. A CPU that multiplies
bfloat16 returns bfloat16: good enough for gradients, whose parts are summed in fp32, and not for logits. A
logit of 20 would be off by up to 0.06, so a CPU's logits are products of fp32 numbers.

A CPU projects to a slice of the vocabulary at a time: a widened part of a bf16 weight then stays in its
cache.

    R = rows of a block, d = hidden size, V = vocabulary
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dpo_opt.optimize.forward.device_path import takes_gpu_path
from dpo_opt.optimize.forward.gradient_place import CACHED_ROWS, sum_product


def gradient_operands(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What the two products of a backward multiply where a model computes in ``dtype``.

    Not every CPU has bfloat16 products. One that has not is faster in fp32.
    """
    fast = takes_gpu_path(device) or (dtype == torch.bfloat16 and _multiplies_bf16())
    return dtype if fast else torch.float32


def logit_operands(dtype: torch.dtype, hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What the product of a forward multiplies where a model computes in ``dtype``."""
    exact = hidden.dtype == weight.dtype == dtype
    return dtype if exact and takes_gpu_path(hidden.device) else torch.float32


def project(states: Tensor, weight: Tensor, *, out: Tensor, tf32: bool) -> None:
    """Write the logits of (R, d) states to ``out``, (R, V) float32.

    Args:
        states: In the dtype of the operands.
        weight: (V, d).
        out: Overwritten.
        tf32: Whether a GPU multiplies fp32 numbers on its tensor cores, rounded to TF32.
    """
    with _tf32() if tf32 else contextlib.nullcontext():
        for rows, into in zip(_slices(weight), _slices(out, dim=1), strict=True):
            _product(states, rows.to(states.dtype).t(), out=into)


def towards_states(derivatives: Tensor, weight: Tensor) -> Tensor:
    """``derivatives @ weight``, (R, d): float32, or in half precision what a CPU rounds to it.

    Args:
        derivatives: (R, V) with respect to the logits, in the dtype of the operands.
        weight: (V, d), in the same. A slice of it gives a part that the others nearly cancel; rounded one by
            one, they would add up to four times the error.
    """
    return _product(derivatives, weight)


def add_towards_weight(total: Tensor | None, derivatives: Tensor, states: Tensor) -> Tensor:
    """``total + derivatives.T @ states``, (V, d) float32, in the memory of ``total`` if there is one.

    Args:
        total: The sum of the blocks before; None before the first.
        derivatives: (R, V) with respect to the logits, in the dtype of the operands.
        states: (R, d) in that dtype.
    """
    if takes_gpu_path(states.device):
        product = _product(derivatives.t(), states)
        return product if total is None else total.add_(product)
    begun = total is not None
    if total is None:
        total = states.new_empty(derivatives.shape[1], states.shape[1], dtype=torch.float32)
    sum_product(total, derivatives.t(), states, begun=begun)
    return total


def _slices(tensor: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    """Parts along the vocabulary; on a GPU the whole."""
    return (tensor,) if takes_gpu_path(tensor.device) else torch.split(tensor, CACHED_ROWS, dim)


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b``: in fp32, but a CPU's of operands in half precision, which has their dtype."""
    if a.dtype == torch.float32 or not takes_gpu_path(a.device):
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _multiplies_bf16() -> bool:
    """Whether this CPU has instructions for it: those of x86, and of ARM."""
    has = torch.cpu.get_capabilities()
    return any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


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
