"""Elementwise results that backward computes again: norms, activation functions, gated products.

A matrix product keeps its input for the gradient of its weight. Nearly always that is such a result: as wide
as the product, but made at no cost from a tensor that is kept anyway. Autograd keeps it all the same, and
what it was made through. Here backward makes it again, once for all that need it.
"""

import dis
from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS

from dpo_opt.optimize.forward.architecture import decoder_of
from dpo_opt.optimize.forward.computed_again import Kept, computes_again, stand_for, watched
from dpo_opt.optimize.forward.rms_norm import is_llama_rms_norm, rms_norm

_ACTIVATIONS = tuple({made[0] if isinstance(made, tuple) else made for made in ACT2CLS.values()})
_GATED = ("down_proj", "act_fn", "gate_proj", "up_proj")


def recompute_elementwise(model: PreTrainedModel) -> None:
    """Let backward compute elementwise results again. Log-probs stay exactly the same.

    Gradients differ by rounding: a norm gives its input one gradient, and autograd adds its parts one by one.

    Args:
        model: Changed in place: its norms, activation functions, gated MLPs and gates of experts, as far as
            they are written as in most models. What is written otherwise is kept as before.
    """
    decoder = decoder_of(model)
    for module in decoder.modules():
        if _is_gated(module):
            module.forward = MethodType(_gated, module)
        elif hasattr(module, "_apply_gate"):
            module._apply_gate = partial(_method, module._apply_gate, getattr(module, "act_fn", None))
        elif is_llama_rms_norm(module):
            module.forward = MethodType(rms_norm, module)
        elif isinstance(module, (torch.nn.LayerNorm, *_ACTIVATIONS)) or _is_rms_norm(module):
            module.forward = partial(_method, module.forward, module)
    decoder.forward = partial(watched, decoder.forward)


def _is_gated(module: torch.nn.Module) -> bool:
    """Whether a module is ``down_proj(act_fn(gate_proj(x)) * up_proj(x))`` and nothing else."""
    if not all(isinstance(getattr(module, name, None), torch.nn.Module) for name in _GATED):
        return False
    code = type(module).forward.__code__
    products = [step.argrepr for step in dis.get_instructions(code) if step.opname == "BINARY_OP"]
    return code.co_names == _GATED and products == ["*"] and code.co_argcount == 2


def _is_rms_norm(module: torch.nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm")


def _gated(module: Any, hidden: Tensor) -> Any:
    def product(gate: Tensor, up: Tensor) -> Tensor:
        result: Tensor = module.act_fn(gate) * up
        return result

    gate, up = module.gate_proj(hidden), module.up_proj(hidden)
    return module.down_proj(recomputed(product, (gate, up), tuple(module.act_fn.parameters())))


def _method(plain: Callable[..., Any], owner: torch.nn.Module | None, *inputs: Any, **options: Any) -> Any:
    """A method's result, recomputed; it reads the parameters of ``owner``."""
    if len(inputs) != 1 or options:  # norms with a gate of their own
        return plain(*inputs, **options)
    # Read at each call: sharding gives a module other parameters.
    return recomputed(plain, inputs, () if owner is None else tuple(owner.parameters()))


def recomputed(
    compute: Callable[..., Tensor], inputs: Sequence[Tensor], parameters: Sequence[Tensor] = ()
) -> Tensor:
    """``compute(*inputs)``, which reads ``parameters``. In a model that recomputes it is not kept."""
    needed = any(tensor.requires_grad for tensor in (*inputs, *parameters))
    if not needed or not computes_again():
        return compute(*inputs)
    value: Tensor = _Recomputed.apply(  # type: ignore[no-untyped-call]
        compute, len(inputs), *inputs, *parameters
    )
    return value


class _Recomputed(torch.autograd.Function):
    """Keeps the inputs of a computation, and lets what it gives be kept as a ``_Computed``."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Tensor], count: int, *tensors: Tensor) -> Tensor:
        inputs, parameters = tensors[:count], tensors[count:]
        value = compute(*inputs)
        ctx.result = _Computed(compute, inputs, ctx.needs_input_grad[2 : 2 + count])
        ctx.parameters = parameters
        stand_for(value, ctx.result)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        leaves, value = ctx.result.graph()
        # Nothing asks for it any more: all that the value went into had its backward before.
        ctx.result.forget()
        wanted = [leaf for leaf in (*leaves, *ctx.parameters) if leaf.requires_grad]
        found = iter(torch.autograd.grad(value, wanted, grad))
        return None, None, *(next(found) if needed else None for needed in ctx.needs_input_grad[2:])


class _Computed:
    """A result that is not kept, but what it is computed from."""

    def __init__(
        self, compute: Callable[..., Tensor], inputs: Sequence[Tensor], differentiable: Sequence[bool]
    ) -> None:
        self._compute = compute
        self._inputs = [Kept(tensor) for tensor in inputs]
        self._differentiable = differentiable
        self._graph: tuple[list[Tensor], Tensor] | None = None
        self._device = inputs[0].device.type
        # Backward runs outside the forward's context.
        self._autocast = torch.is_autocast_enabled(self._device), torch.get_autocast_dtype(self._device)

    def graph(self) -> tuple[list[Tensor], Tensor]:
        """The inputs, and the result with its graph down to them; computed at the first call."""
        if self._graph is None:
            leaves = [
                kept.tensor().detach().requires_grad_(differentiable)
                for kept, differentiable in zip(self._inputs, self._differentiable, strict=True)
            ]
            enabled, dtype = self._autocast
            with torch.enable_grad(), torch.autocast(self._device, dtype, enabled, cache_enabled=False):
                self._graph = leaves, self._compute(*leaves)
        return self._graph

    def value(self) -> Tensor:
        """The result."""
        return self.graph()[1]

    def forget(self) -> None:
        """Free the inputs and the result: a graph's nodes live until all of its backward is done."""
        self._inputs, self._graph = [], None
