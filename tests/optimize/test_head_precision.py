"""The head in half precision: how far rounding moves log-probs, and the products that a GPU would compute.

A CPU has no products of bf16 numbers in fp32. Rounding the operands and multiplying in fp32 gives what a GPU
computes.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_opt.optimize.forward import head_products
from dpo_opt.optimize.forward import logps as logps_module
from dpo_opt.optimize.forward.device_path import standing_for_gpu
from dpo_opt.schemas.errors import ConfigError

BF16, FP32 = torch.bfloat16, torch.float32
TEXT = (
    "The llama is a domesticated camelid that has been kept in the Andes for five thousand years. It "
    "carries loads of up to forty kilograms, gives wool and meat, and guards sheep against dogs and foxes. "
    "Its nearest wild relative is the guanaco. Llamas live in herds, hum when they are worried, and spit at "
    "each other to settle who stands where. In 1989 there were about seven million, most of them in Bolivia."
)


class Head(NamedTuple):
    """Hidden states that a model computed, the tokens that they predict, and the model's head."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor

    def stored_in(self, dtype: torch.dtype) -> "Head":
        return Head(self.hidden.to(dtype), self.weight.to(dtype), self.targets)

    def run(self, dtype: torch.dtype, *, on_gpu: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs and gradients, computed as a GPU does in this dtype, or a CPU that multiplies bf16."""
        inputs = [t.clone().requires_grad_() for t in (self.hidden, self.weight)]
        upstream = torch.randn(len(self.targets), generator=torch.Generator().manual_seed(0))
        with pytest.MonkeyPatch.context() as monkeypatch, standing_for_gpu(on_gpu):
            monkeypatch.setattr(head_products, "_multiplies_bf16", lambda: True)
            if on_gpu:
                monkeypatch.setattr(head_products, "_product", product_as_on_a_gpu)
            apply: Any = logps_module._TokenLogps.apply
            logps = apply(*inputs, None, self.targets, 1.0, None, dtype, True, None, None)
            of_hidden, of_weight = torch.autograd.grad(logps, inputs, upstream)
        return logps.detach(), of_hidden.float(), of_weight.float()


@pytest.fixture(scope="module", params=["tiny", pytest.param("smollm2", marks=pytest.mark.slow)])
def head(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Head:
    folder = tiny_model
    if request.param == "smollm2":
        from dpo_opt.demo_model import smollm2_folder

        try:
            folder = smollm2_folder(tmp_path_factory.mktemp("smollm2") / "model")
        except ConfigError as error:
            pytest.skip(error.what)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=FP32).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"][:256]])
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    return Head(hidden[:-1], model.get_output_embeddings().weight.detach(), ids[0, 1:])


def precision_of_products() -> str:
    matmul: Any = torch.backends.cuda.matmul
    return str(matmul.fp32_precision)


def product_as_on_a_gpu(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    assert a.dtype == b.dtype
    if a.dtype == FP32 and precision_of_products() == "tf32":
        a, b = in_tf32(a), in_tf32(b)
    return torch.mm(a.float(), b.float(), out=out)


def in_tf32(values: Tensor) -> Tensor:
    """Rounded to the nearest number of 11 significant bits."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & -(1 << 13)).view(FP32)


def test_bf16_compute_moves_log_probs_and_gradients_little(head: Head) -> None:
    exact, found = head.run(FP32), head.run(BF16)
    error = found[0] - exact[0]
    assert 0 < error.std() <= 0.007
    assert abs(error.mean()) <= 0.001
    for mine, wanted in zip(found[1:], exact[1:], strict=True):
        assert 0 < (mine - wanted).norm() <= 4e-3 * wanted.norm()


def test_bf16_weights_and_states_lose_nothing_in_the_head(head: Head) -> None:
    narrow = head.stored_in(BF16)
    exact, found = narrow.stored_in(FP32).run(FP32), narrow.run(BF16)
    torch.testing.assert_close(found[0], exact[0], rtol=0, atol=1e-6)
    for mine, wanted in zip(found[1:], exact[1:], strict=True):
        assert (mine - wanted).norm() <= 4e-3 * wanted.norm()
    # Logits in bf16 would lose much.
    logits = narrow.hidden @ narrow.weight.T
    rounded = logits.float().log_softmax(-1).gather(1, narrow.targets[:, None]).squeeze(1)
    assert (rounded - exact[0]).std() > 1e-3


@pytest.mark.parametrize("stored", [FP32, BF16], ids=str)
def test_a_cpu_in_bf16_rounds_gradients_and_no_log_probs(head: Head, stored: torch.dtype) -> None:
    head = head.stored_in(stored)
    exact, found = head.stored_in(FP32).run(FP32, on_gpu=False), head.run(BF16, on_gpu=False)
    torch.testing.assert_close(found[0], exact[0], rtol=0, atol=1e-6)
    for mine, wanted in zip(found[1:], exact[1:], strict=True):
        assert 0 < (mine - wanted).norm() <= 4e-3 * wanted.norm()


def test_a_cpu_without_bf16_multiplies_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, dtype in (({"avx512_bf16": True}, BF16), ({"avx512_f": True, "amx_bf16": False}, FP32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
        assert head_products.gradient_operands(BF16, torch.device("cpu")) == dtype
        assert head_products.gradient_operands(torch.float16, torch.device("cpu")) == FP32


class Product(NamedTuple):
    """A matrix product that was asked for."""

    operations: int
    operands: torch.dtype
    result: torch.dtype
    precision: str
    """Of products of fp32 numbers."""


class Products(TorchDispatchMode):
    """Records products; refuses what makes the CPU wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Product] = []

    def __torch_dispatch__(self, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if operation.overloadpacket is torch.ops.aten.mm:
            a, b = args[:2]
            assert a.dtype == b.dtype
            size = 2 * a.shape[0] * a.shape[1] * b.shape[1]
            self.found.append(Product(size, a.dtype, result.dtype, precision_of_products()))
        else:
            assert not any(word in operation.name() for word in ("mm", "matmul", "linear", "item", "nonzero"))
        return result


def on_a_gpu(
    rows: int, *, stored: torch.dtype, compute: torch.dtype, trained: bool = True
) -> list[tuple[float, torch.dtype, torch.dtype, str]]:
    """Products of a head with 262,144 tokens: each kind's size in units of a projection, operands, result."""
    width, vocabulary = 2304, 262_144
    context = SimpleNamespace(needs_input_grad=(True, trained, False))
    context.save_for_backward = lambda *tensors: setattr(context, "saved_tensors", tensors)
    # Autograd does not run on the fake tensors of a device that torch was not built for.
    with torch.no_grad(), FakeTensorMode(), Products() as products:
        hidden = torch.empty(rows, width, device="cuda", dtype=stored)
        weight = torch.empty(vocabulary, width, device="cuda", dtype=stored)
        targets = torch.empty(rows, device="cuda", dtype=torch.int64)
        head: Any = logps_module._TokenLogps
        logps = head.forward(context, hidden, weight, None, targets, 1.0, None, compute, True, None, None)
        assert (logps.dtype, logps.device.type) == (FP32, "cuda")
        of_hidden, of_weight, *_ = head.backward(context, torch.empty_like(logps))
        assert of_hidden.dtype == stored
        assert (of_weight.dtype if trained else of_weight) == (stored if trained else None)
    sizes: dict[tuple[torch.dtype, torch.dtype, str], int] = {}
    for size, *kind in products.found:
        sizes[tuple(kind)] = sizes.get(tuple(kind), 0) + size  # type: ignore[index, arg-type]
    return [(size / (2 * rows * vocabulary * width), *kind) for kind, size in sizes.items()]


@pytest.mark.parametrize("rows", [37, 2 * 600, 2 * 4096])
def test_a_head_takes_three_products_on_tensor_cores(rows: int) -> None:
    before = precision_of_products()
    assert on_a_gpu(rows, stored=BF16, compute=BF16) == [(1, BF16, FP32, "tf32"), (2, BF16, FP32, before)]
    assert on_a_gpu(rows, stored=FP32, compute=BF16) == [(1, FP32, FP32, "tf32"), (2, BF16, FP32, before)]
    assert precision_of_products() == before != "tf32"


def test_a_head_in_fp32_multiplies_in_fp32() -> None:
    assert on_a_gpu(2 * 600, stored=FP32, compute=FP32) == [(3, FP32, FP32, precision_of_products())]


def test_a_frozen_head_takes_two_products_of_any_length() -> None:
    found = on_a_gpu(40_000, stored=BF16, compute=BF16, trained=False)
    assert sum(size for size, *_ in found) == 2


def test_what_exceeds_the_memory_that_is_kept_is_projected_again() -> None:
    rows = 4 * 8192
    found = on_a_gpu(rows, stored=BF16, compute=BF16)
    assert sum(size for size, *_ in found) == 3.75
