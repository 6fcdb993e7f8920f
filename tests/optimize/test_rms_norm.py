"""RMSNorm with a derivative of its own: autograd's numbers, and only where a norm is written as Llama's."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from dpo_opt.optimize.forward import rms_norm as source
from dpo_opt.optimize.forward.computed_again import watched
from dpo_opt.optimize.forward.rms_norm import is_llama_rms_norm, rms_norm

BF16, FP32 = torch.bfloat16, torch.float32


class Shifted(LlamaRMSNorm):
    """Llama's but for a constant."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(3).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


@pytest.mark.parametrize(
    ("kind", "is_one"),
    [
        *((LlamaRMSNorm, True), (Qwen3RMSNorm, True)),
        # Another weight, the weight before the rounding, another constant.
        *((GemmaRMSNorm, False), (Olmo2RMSNorm, False), (Shifted, False), (torch.nn.LayerNorm, False)),
    ],
)
def test_a_norm_is_told_by_what_is_written(kind: Any, is_one: bool) -> None:
    assert is_llama_rms_norm(kind(8)) is is_one


@pytest.mark.parametrize("kind", [GemmaRMSNorm, Olmo2RMSNorm, Shifted])
def test_a_llama_that_was_written_anew_is_not_known(kind: Any) -> None:
    """What another version of transformers may have under the name."""
    assert source._is_known(LlamaRMSNorm)
    assert not source._is_known(kind)


def test_a_norm_whose_kernel_was_replaced_is_left_alone() -> None:
    norm = LlamaRMSNorm(8)
    norm.forward = norm.forward
    assert not is_llama_rms_norm(norm)


def norm_of(weight_dtype: torch.dtype, trained: bool = True) -> Any:
    norm = LlamaRMSNorm(48, eps=1e-3)
    torch.manual_seed(1)
    norm.weight.data.normal_(1.0, 0.5)
    return norm.to(weight_dtype).requires_grad_(trained)


def gradients(norm: Any, hidden: Tensor, own: bool) -> tuple[Tensor, list[Tensor | None]]:
    """Output, and gradients of the input and the weight, of a norm with two readers."""
    hidden = hidden.clone().requires_grad_()
    norm.weight.grad = None

    def forward() -> Tensor:
        found: Tensor = rms_norm(norm, hidden) if own else norm(hidden)
        return found

    output = watched(forward)
    factors = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
    ((output * factors).sum() + output.float().square().sum()).backward()
    return output.detach(), [hidden.grad, norm.weight.grad]


@pytest.mark.parametrize(("hidden", "weight"), [(FP32, FP32), (BF16, BF16), (BF16, FP32), (FP32, BF16)])
@pytest.mark.parametrize("trained", [True, False])
def test_outputs_are_the_same_and_gradients_within_rounding(
    hidden: torch.dtype, weight: torch.dtype, trained: bool
) -> None:
    torch.manual_seed(0)
    states = torch.randn(2, 5, 48).to(hidden)
    norm = norm_of(weight, trained)
    expected, autograd = gradients(norm, states, own=False)
    output, found = gradients(norm, states, own=True)
    assert output.dtype == expected.dtype
    assert torch.equal(output, expected)
    assert [grad is None for grad in found] == [False, not trained]
    limit = 1e-6 if hidden == weight == FP32 else 1e-2
    for ours, theirs in zip(found, autograd, strict=True):
        if ours is not None and theirs is not None:
            assert ours.dtype == theirs.dtype
            assert float((ours - theirs).norm()) <= limit * float(theirs.norm())


def test_a_wrong_derivative_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail: without the mean, the gradient of the input is another."""
    addcmul = Tensor.addcmul_
    monkeypatch.setattr(Tensor, "addcmul_", lambda self, *_, **__: addcmul(self, self, self, value=0))
    with pytest.raises(AssertionError):
        test_outputs_are_the_same_and_gradients_within_rounding(FP32, FP32, True)


def test_rows_are_not_kept() -> None:
    """Of a norm, autograd keeps its input and one number per row."""
    states = torch.randn(7, 48, requires_grad=True)
    kept: list[int] = []

    def forward() -> Tensor:
        value = rms_norm(norm_of(FP32), states)
        kept.append(value.untyped_storage()._cdata)
        return value.square()

    output = watched(forward)
    (saved,) = {type(output.grad_fn._saved_self)}  # type: ignore[union-attr]
    assert saved is Tensor
    normed = output.grad_fn.next_functions[0][0].normed  # type: ignore[union-attr]
    assert normed.inverse.shape == (7, 1)
    assert output.grad_fn._saved_self.untyped_storage()._cdata != kept[0]  # type: ignore[union-attr]


def test_an_input_that_is_changed_in_place_is_told() -> None:
    states = torch.randn(3, 48, requires_grad=True)
    hidden = states * 1
    output = watched(lambda: rms_norm(norm_of(FP32), hidden).sum())
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        output.backward()


def test_outside_a_model_that_computes_again_the_norm_is_the_module_s_own() -> None:
    output = rms_norm(norm_of(FP32), torch.randn(3, 48, requires_grad=True))
    assert source._RmsNorm.__name__ not in type(output.grad_fn).__name__
