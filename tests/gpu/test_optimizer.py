"""Stochastic rounding and the optimizers' state on a CUDA device."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchrun_steps import ALONE

from dpo_opt.optimize import TrainConfig
from dpo_opt.optimize.checkpoint.state_files import load_state, save_state
from dpo_opt.optimize.update.bf16_adamw import round_stochastically
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
    save_state(tmp_path / "optimizer", first.state(), ALONE)
    torch.rand(3, device=cuda)
    load_state(tmp_path / "optimizer", second.state(), ALONE)
    second.step(range(3, 6))
    assert torch.equal(second.weight, whole.weight)
    for name, expected in whole.state().items():
        assert torch.equal(second.state()[name], expected), name
