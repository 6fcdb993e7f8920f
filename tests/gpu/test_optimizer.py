"""Stochastic rounding and the optimizers' state on a CUDA device."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchrun_steps import ALONE

from dpo_opt.optimize import TrainConfig
from dpo_opt.optimize.checkpoint.state_files import load_state, own_files, save_state
from dpo_opt.optimize.update.bf16_adamw import RoundedAdamW, round_stochastically
from dpo_opt.optimize.update.optimizer import make_optimizer
from dpo_opt.optimize.update.optimizer_state import optimizer_tensors

pytestmark = pytest.mark.gpu


def test_a_gpu_rounds_as_a_cpu_does(cuda: torch.device) -> None:
    values = torch.randn(5_000_001, generator=torch.Generator().manual_seed(0))
    values[:2] = torch.tensor([float("inf"), -float("inf")])
    settings = {"seed": 1, "step": 2, "parameter": 3}
    assert torch.equal(
        round_stochastically(values.to(cuda), **settings).cpu(), round_stochastically(values, **settings)
    )


def test_a_nan_made_on_a_gpu_stays_one(cuda: torch.device) -> None:
    zero = torch.zeros(1000, device=cuda)
    assert bool(round_stochastically(zero / zero, seed=1, step=2, parameter=3).isnan().all())


@pytest.mark.parametrize("gradient_dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_updates_as_the_blocks_do(cuda: torch.device, gradient_dtype: torch.dtype) -> None:
    count = 3_000_001
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(count, generator=generator) * 0.02

    def made(device: torch.device) -> tuple[nn.Parameter, RoundedAdamW]:
        weight = nn.Parameter(start.to(device, torch.bfloat16))
        weight.grad_dtype = gradient_dtype
        settings = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
        return weight, RoundedAdamW([weight], seed=5, **settings)  # type: ignore[arg-type]

    (weight, optimizer), (expected, on_cpu) = made(cuda), made(torch.device("cpu"))
    for _ in range(3):
        gradient = (torch.randn(count, generator=generator) * 1e-3).to(gradient_dtype)
        weight.grad, expected.grad = gradient.to(cuda), gradient
        optimizer.step()
        on_cpu.step()
        pairs = [(weight.detach(), expected.detach())]
        for name in ("exp_avg", "exp_avg_sq"):
            pairs.append((optimizer.state[weight][name], on_cpu.state[expected][name]))
        for mine, wanted in pairs:
            # Neighbours at most. Where a mean's two terms cancel, only their last bits in fp32 are left.
            cancelled = 1e-6 * float(wanted.abs().float().median())
            torch.testing.assert_close(mine.cpu(), wanted, rtol=2**-7, atol=cancelled)
            assert (mine.cpu() != wanted).float().mean() < 1e-3
            mine.copy_(wanted)


def test_an_update_waits_for_nothing(cuda: torch.device) -> None:
    weights = [nn.Parameter(torch.ones(1000, device=cuda, dtype=d)) for d in (torch.bfloat16, torch.float32)]
    optimizer = RoundedAdamW(weights, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, seed=5)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()  # compiles
    before = [weight.detach().clone() for weight in weights]
    torch.cuda.set_sync_debug_mode("error")  # what waits raises
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(not torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))


class Run:
    """One parameter on the device, stepped on gradients that only the step decides."""

    def __init__(self, optim: str, dtype: torch.dtype, device: torch.device) -> None:
        weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) * 0.02
        self.weight = nn.Parameter(weight.to(device, dtype))
        config = TrainConfig(
            shards=Path("shards"), model="model", output_dir=Path("run"), optim=optim,  # type: ignore[arg-type]
            learning_rate=1e-5, weight_decay=0.1,
        )  # fmt: skip
        self.optimizer = make_optimizer(nn.ParameterList([self.weight]), config)

    def step(self, steps: range) -> None:
        for step in steps:
            gradient = torch.randn(256, 256, generator=torch.Generator().manual_seed(step))
            self.weight.grad = gradient.to(self.weight)
            self.optimizer.step()

    def state(self) -> dict[str, Tensor]:
        return optimizer_tensors(self.optimizer, {self.weight: "weight"})


@pytest.mark.parametrize(
    ("optim", "dtype"),
    [
        ("adamw", torch.float32),
        ("rmsprop", torch.float32),
        ("adamw", torch.bfloat16),
        ("adamw-8bit", torch.float32),
        ("adamw-8bit", torch.bfloat16),
    ],
)
def test_a_run_that_goes_on_is_one_that_never_stopped(
    cuda: torch.device, tmp_path: Path, optim: str, dtype: torch.dtype
) -> None:
    if optim == "adamw-8bit":
        pytest.importorskip(
            "torchao.optim", reason="torchao is not installed: pip install 'dpo-opt[torchao]'"
        )
    whole, first, second = (Run(optim, dtype, cuda) for _ in range(3))
    whole.step(range(6))
    first.step(range(3))
    second.weight.data.copy_(first.weight)
    save_state(tmp_path / "optimizer", own_files(first.state(), ALONE), ALONE)
    torch.rand(3, device=cuda)
    load_state(tmp_path / "optimizer", second.state(), ALONE)
    second.step(range(3, 6))
    assert torch.equal(second.weight, whole.weight)
    for name, expected in whole.state().items():
        assert torch.equal(second.state()[name], expected), name
