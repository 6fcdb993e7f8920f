"""RMSNorm as Llama writes it, which most models copy word by word, with its derivative in closed form.

    y = w * n,  n = x * r,  r = 1 / sqrt(mean(x^2) + eps)        (Zhang and Sennrich 2019, equation 4)
    dw = sum over rows of dy * n
    dx = r * (dy * w - n * mean(dy * w * n))

Autograd goes over the rows ten times for that, and keeps what it goes over. Here backward needs x, and r: one
number per row.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dpo_opt.optimize.forward.computed_again import Kept, computes_again, stand_for


def is_llama_rms_norm(module: torch.nn.Module) -> bool:
    """Whether the module's forward is Llama's, under whatever name. Gemma's, for one, is not."""
    written = _written(type(module))
    return _LLAMA_IS_KNOWN and "forward" not in vars(module) and written == _written(LlamaRMSNorm)


def _written(kind: type[torch.nn.Module]) -> tuple[Any, ...] | None:
    code = getattr(kind.forward, "__code__", None)
    # The first constant is the docstring.
    return None if code is None else (code.co_code, code.co_names, code.co_consts[1:])


def rms_norm(module: Any, hidden_states: Tensor) -> Tensor:
    """The module's output, (..., N). In a model that computes results again it is not kept.

    Args:
        module: One that ``is_llama_rms_norm`` is true of.
        hidden_states: (..., N), float32 or in half precision: what policies compute in.
    """
    # Read at each call: sharding gives a module other parameters.
    weight: Tensor = module.weight
    if not computes_again() or not (hidden_states.requires_grad or weight.requires_grad):
        output: Tensor = type(module).forward(module, hidden_states)
        return output
    value: Tensor = _RmsNorm.apply(hidden_states, weight, module.variance_epsilon)  # type: ignore[no-untyped-call]
    return value


def _computed(hidden: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The output, and r of each row, (..., 1): Llama's operations in Llama's order, and so the same bits."""
    wide = hidden.to(torch.float32)
    rows = wide.pow(2)
    inverse = torch.rsqrt(rows.mean(-1, keepdim=True) + epsilon)
    torch.mul(wide, inverse, out=rows)
    rows = rows.to(hidden.dtype)
    in_place = torch.result_type(weight, rows) == rows.dtype
    return rows.mul_(weight) if in_place else weight * rows, inverse


@torch.no_grad()
def _is_known(kind: type[Any]) -> bool:
    """Whether a norm gives the numbers of ``_computed``, rounded as there."""
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.linspace(-2, 3, 96, dtype=dtype, device="cpu").view(4, 24)
        norm = kind(24, eps=1e-3).to("cpu", dtype)
        norm.weight.copy_(hidden[1])
        if not torch.equal(norm(hidden), _computed(hidden, norm.weight, 1e-3)[0]):
            return False
    return True


_LLAMA_IS_KNOWN = _is_known(LlamaRMSNorm)
"""Whether this version of transformers writes it as those did that the formulas above were taken from."""


class _RmsNorm(torch.autograd.Function):
    """Keeps the input and one number per row."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        value, inverse = _computed(hidden, weight, epsilon)
        ctx.normed = _Normed(hidden, weight, inverse)
        stand_for(value, ctx.normed)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        normed: _Normed = ctx.normed
        rows, weight, inverse = normed.rows(), normed.weight.float(), normed.inverse
        # Nothing asks for the output any more: all that it went into had its backward before.
        normed.forget()
        grad = grad.float()
        product = grad * rows
        to_hidden = to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = product.flatten(0, -2).sum(0).to(normed.weight.dtype)
        if ctx.needs_input_grad[0]:
            mean = (product @ weight).unsqueeze(-1).div_(weight.numel())
            torch.mul(grad, weight, out=product)
            to_hidden = product.addcmul_(rows, mean, value=-1).mul_(inverse).to(normed.dtype)
        return to_hidden, to_weight, None


class _Normed:
    """The output of a norm, which is not kept."""

    def __init__(self, hidden: Tensor, weight: Tensor, inverse: Tensor) -> None:
        self.dtype = hidden.dtype
        self.weight = weight.detach()
        self.inverse = inverse
        self._hidden: Kept | None = Kept(hidden)
        self._rows: Tensor | None = None
        self._value: Tensor | None = None

    def rows(self) -> Tensor:
        """The input over its root mean square, (..., N) float32."""
        if self._rows is None:
            assert self._hidden is not None
            self._rows = self._hidden.tensor() * self.inverse
        return self._rows

    def value(self) -> Tensor:
        """The output, (..., N)."""
        if self._value is None:
            self._value = self.weight * self.rows().to(self.dtype)
        return self._value

    def forget(self) -> None:
        """Free the rows: a graph's nodes live until all of its backward is done."""
        self._hidden = self._rows = self._value = None
