"""Linear layers whose fp32 weights are rounded to half precision at every use, and not kept rounded.

Autocast rounds a weight in the forward and keeps the rounded copy for the backward: half a model more in
memory for as long as a micro-batch lives. Here the backward rounds it again, which costs one pass over it.

Where a weight's gradient has a place, it is summed there. Autograd would widen it in a pass of its own, and
add it in another.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dpo_opt.optimize.forward.gradient_place import add_product, gradient_place


def round_weights_at_use(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Make every linear layer of the model round its fp32 weight twice instead of keeping it rounded.

    Outputs and gradients stay those of autocast, bit by bit.

    Args:
        model: A model or decoder; linear layers of other classes than ``torch.nn.Linear`` are left alone.
        dtype: The half precision that the model computes in.
    """

    def forward(layer: torch.nn.Linear, hidden: Tensor) -> Tensor:
        # Another context computes in another dtype: the fp32 probe of layouts, for one.
        kind = hidden.device.type
        if not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) != dtype:
            return functional.linear(hidden, layer.weight, layer.bias)
        output: Tensor = _NarrowLinear.apply(  # type: ignore[no-untyped-call]
            hidden, layer.weight, layer.bias, dtype
        )
        return output

    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]


class _NarrowLinear(torch.autograd.Function):
    """``hidden @ weight.T + bias`` in ``dtype``; keeps input and weight themselves."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        narrow = hidden.to(dtype)
        # Several layers read a norm's output: kept as it is, it is kept once.
        ctx.save_for_backward(hidden, weight)
        # What is saved can come back as another tensor, without the parameter's gradient.
        ctx.placed = weight if gradient_place(weight) is not None else None
        ctx.bias_dtype = None if bias is None else bias.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            return functional.linear(narrow, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (grad,) = grads
        hidden, weight = ctx.saved_tensors
        to_input = to_weight = to_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                to_input = (grad @ weight.to(grad.dtype)).to(hidden.dtype)
            rows = grad.flatten(0, -2)
            if ctx.needs_input_grad[1]:
                states = hidden.flatten(0, -2).to(grad.dtype)
                if ctx.placed is None:
                    to_weight = (rows.t() @ states).to(weight.dtype)
                else:
                    add_product(ctx.placed, rows.t(), states)
            if ctx.needs_input_grad[2]:
                to_bias = rows.sum(0).to(ctx.bias_dtype)
        return to_input, to_weight, to_bias, None
