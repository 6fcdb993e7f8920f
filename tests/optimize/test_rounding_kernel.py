"""The GPU's update of bf16 parameters: run by Triton's interpreter, compiled for real GPUs, and counted."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_opt.optimize.update import bf16_adamw
from dpo_opt.optimize.update.bf16_adamw import RoundedAdamW

BF16, FP32 = torch.bfloat16, torch.float32
SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
NO_TRITON = "triton is not installed: pip install triton"


def load_kernel() -> ModuleType:
    """A copy of the module of its own: Triton chooses between interpreter and compiler when it is loaded."""
    path = Path(bf16_adamw.__file__).with_name("rounding_kernel.py")
    spec = importlib.util.spec_from_file_location("rounding_kernel", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("triton", reason=NO_TRITON)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return load_kernel()


def update(kernel: ModuleType, stored: list[Tensor], gradient: Tensor, *, step: int) -> None:
    """The kernel's update of the first parameter of an optimizer with seed 5."""
    keys = bf16_adamw._keys(5, step, 0)
    kernel.update(stored[0], gradient, stored[1], stored[2], step=step, keys=keys, **SETTINGS)


@pytest.mark.parametrize("gradient_dtype", [BF16, FP32])
def test_the_kernel_computes_what_a_cpu_computes(
    interpreted: ModuleType, gradient_dtype: torch.dtype
) -> None:
    count = 3003  # not whole blocks
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter((torch.randn(count, generator=generator) * 0.02).to(BF16))
    weight.grad_dtype = gradient_dtype
    optimizer = RoundedAdamW([weight], seed=5, **SETTINGS)
    stored = [weight.detach().clone(), *torch.zeros(2, count, dtype=BF16)]
    different = 0
    for step in range(1, 5):
        weight.grad = (torch.randn(count, generator=generator) * 1e-3).to(gradient_dtype)
        update(interpreted, stored, weight.grad, step=step)
        optimizer.step()
        state = optimizer.state[weight]
        for mine, expected in zip(
            stored, (weight.detach(), state["exp_avg"], state["exp_avg_sq"]), strict=True
        ):
            # Neighbours at most. Where a mean's two terms cancel, only their last bits in fp32 are left.
            cancelled = 1e-6 * float(expected.abs().float().median())
            torch.testing.assert_close(mine, expected, rtol=2**-7, atol=cancelled)
            different += int((mine != expected).sum())
            mine.copy_(expected)
    # fp32 arithmetic in another order may cross a rounding's threshold: once in 2^16 for each last bit.
    assert different <= 4 * 3 * count / 1000


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, of infinity by infinity
def test_the_kernel_keeps_what_is_no_number(interpreted: ModuleType) -> None:
    gradient = torch.zeros(40, dtype=BF16)
    gradient[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    stored = [torch.ones(40, dtype=BF16), *torch.zeros(2, 40, dtype=BF16)]
    update(interpreted, stored, gradient, step=1)
    value, mean, square = stored
    assert value.isnan().tolist() == [True] * 3 + [False] * 37
    assert mean[1:3].tolist() == [float("inf"), -float("inf")]
    assert square[1:3].tolist() == [float("inf")] * 2
    assert bool(mean[0].isnan() & square[0].isnan())


def test_a_part_without_elements_is_left_alone(interpreted: ModuleType) -> None:
    whole = torch.ones(3, 8, dtype=BF16)
    update(interpreted, [row[4:4] for row in whole], torch.zeros(8)[4:4], step=1)
    assert torch.equal(whole, torch.ones(3, 8, dtype=BF16))


@pytest.mark.parametrize(("gradient", "bytes_per_element"), [("*bf16", 14), ("*fp32", 16)])
def test_the_compiled_kernel_reads_and_writes_each_number_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gradient: str, bytes_per_element: int
) -> None:
    pytest.importorskip("triton", reason=NO_TRITON)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = load_kernel()
    types = dict.fromkeys(kernel._kernel.arg_names, "fp32") | {
        "parameter": "*bf16", "gradient": gradient, "exp_avg": "*bf16", "exp_avg_sq": "*bf16", "count": "i64",
        "first_key": "i32", "second_key": "i32", "BLOCK": "constexpr",
    }  # fmt: skip
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(5)}
    source = ASTSource(kernel._kernel, types, constexprs={"BLOCK": kernel._BLOCK}, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    accesses = re.findall(r"\b(?:ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)\b", made.asm["ptx"])
    assert len(accesses) >= 7
    by_a_thread = sum(int(vector or 1) * int(bits) // 8 for vector, bits in accesses)
    assert by_a_thread * 32 * made.metadata.num_warps / kernel._BLOCK == bytes_per_element
    assert "fma." not in made.asm["ptx"]


class Traffic(TorchDispatchMode):
    """Counts bytes of a GPU's tensors that are read and written; refuses copies to and from it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.operations: list[str] = []

    def __torch_dispatch__(self, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        named = dict(zip((a.name for a in operation._schema.arguments), args, strict=False)) | (kwargs or {})
        given = [(a, t) for a in operation._schema.arguments for t in _tensors(named.get(a.name))]
        devices = {t.device.type for _, t in given} | {t.device.type for t in _tensors(result)}
        if "cuda" not in devices or operation.is_view:
            return result
        assert devices == {"cuda"}, operation
        assert "item" not in operation.name()
        assert "_local_scalar_dense" not in operation.name()
        self.operations.append(operation.name())
        written = [t for a, t in given if a.alias_info is not None and a.alias_info.is_write]
        new = [t for t in _tensors(result) if not any(t is old for _, old in given)]
        self.bytes += sum(t.numel() * t.itemsize for t in [*(t for _, t in given), *written, *new])
        return result


def _tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, list | tuple) else [value]
    return [v for v in values if isinstance(v, Tensor)]


@pytest.mark.parametrize(("gradient_dtype", "expected"), [(BF16, 14), (FP32, 16)])
def test_a_step_is_one_pass_without_a_copy(gradient_dtype: torch.dtype, expected: int) -> None:
    shapes = [(64, 32), (32,), (48, 64)]
    with FakeTensorMode():
        weights = [nn.Parameter(torch.empty(shape, device="cuda", dtype=BF16)) for shape in shapes]
        moments = [[torch.empty_like(w.detach()) for _ in range(2)] for w in weights]
        gradients = [torch.empty(shape, device="cuda", dtype=gradient_dtype) for shape in shapes]
    optimizer = RoundedAdamW(weights, seed=0, **SETTINGS)
    for weight, pair, gradient in zip(weights, moments, gradients, strict=True):
        weight.grad_dtype = gradient_dtype
        weight.grad = gradient
        optimizer.state[weight] = {"step": torch.tensor(7.0), "exp_avg": pair[0], "exp_avg_sq": pair[1]}
    with Traffic() as traffic:
        optimizer.step()
    assert traffic.operations == ["dpo_opt::rounded_adamw"] * len(shapes)
    assert traffic.bytes == expected * sum(w.numel() for w in weights)
    assert expected <= 20


def test_a_parameter_that_is_not_bf16_is_updated_without_a_copy() -> None:
    with FakeTensorMode(), Traffic() as traffic:
        tensors = [torch.empty(100, device="cuda") for _ in range(4)]
        traffic.operations.clear()
        bf16_adamw._adamw(*tensors, step=3, group=SETTINGS)
    assert traffic.operations == ["aten::full", "aten::_fused_adamw_"]
