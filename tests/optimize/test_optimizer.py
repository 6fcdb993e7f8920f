import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpo_opt.optimize import TrainConfig
from dpo_opt.optimize.optimizer import learning_rate, make_optimizer


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(shards=Path("shards"), model="model", output_dir=Path("run"), **settings)


def rates(total_steps: int, **settings: Any) -> list[float]:
    made = config(learning_rate=1.0, **settings)
    return [learning_rate(step, total_steps=total_steps, config=made) for step in range(total_steps)]


def test_constant_rate_is_the_peak() -> None:
    assert rates(3, lr_scheduler_type="constant") == [1.0, 1.0, 1.0]


def test_linear_rate_would_reach_zero_after_the_last_step() -> None:
    assert rates(4, lr_scheduler_type="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_cosine_rate_is_half_the_peak_in_the_middle() -> None:
    quarter = (1 + math.sqrt(0.5)) / 2
    assert rates(4, lr_scheduler_type="cosine") == pytest.approx([1.0, quarter, 0.5, 1 - quarter])


@pytest.mark.parametrize(
    ("kind", "after"),
    [("constant", [1.0, 1.0]), ("linear", [1.0, 0.5]), ("cosine", [1.0, 0.5])],
)
def test_warm_up_reaches_the_peak_and_delays_the_schedule(kind: str, after: list[float]) -> None:
    assert rates(6, lr_scheduler_type=kind, warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1.0, *after])


def test_a_run_shorter_than_its_warm_up_only_rises() -> None:
    assert rates(2, warmup_steps=8) == pytest.approx([0.125, 0.25])


class _Model(nn.Module):
    """A matrix, a vector, and a matrix that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(5, 3, generator=generator))
        self.norm = nn.Parameter(torch.randn(5, generator=generator))
        self.frozen = nn.Parameter(torch.randn(5, 3, generator=generator), requires_grad=False)

    def loss(self, step: int) -> Tensor:
        x = (torch.arange(3.0, dtype=torch.float64) + step) / 10
        return (torch.tanh(self.matrix @ x) * self.norm).square().sum()


def weights_after(optimizer: torch.optim.Optimizer, model: _Model, steps: int = 5) -> list[Tensor]:
    for step in range(steps):
        optimizer.zero_grad()
        model.loss(step).backward()
        optimizer.step()
    return [model.matrix.detach(), model.norm.detach()]


def by_hand(model: _Model, *, optim: str, rate: float, weight_decay: float, steps: int = 5) -> list[Tensor]:
    """The papers' equations in float64 on the matrix and the vector; only the matrix is decayed."""
    values = [model.matrix.detach(), model.norm.detach()]
    first = [torch.zeros_like(v) for v in values]
    second = [torch.zeros_like(v) for v in values]
    for t in range(1, steps + 1):
        leaves = [v.clone().requires_grad_() for v in values]
        x = (torch.arange(3.0, dtype=torch.float64) + t - 1) / 10
        (torch.tanh(leaves[0] @ x) * leaves[1]).square().sum().backward()
        for i, decay in enumerate((weight_decay, 0.0)):
            grad = leaves[i].grad
            assert grad is not None
            if optim == "rmsprop":
                grad = grad + decay * values[i]
                second[i] = 0.99 * second[i] + 0.01 * grad**2
                values[i] = values[i] - rate * grad / (second[i].sqrt() + 1e-8)
            else:
                values[i] = values[i] * (1 - rate * decay)
                first[i] = 0.9 * first[i] + 0.1 * grad
                second[i] = 0.999 * second[i] + 0.001 * grad**2
                corrected = first[i] / (1 - 0.9**t), second[i] / (1 - 0.999**t)
                values[i] = values[i] - rate * corrected[0] / (corrected[1].sqrt() + 1e-8)
    return values


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("optim", ["adamw", "rmsprop"])
def test_steps_are_those_of_the_papers(optim: str, weight_decay: float) -> None:
    model = _Model().double()
    expected = by_hand(model, optim=optim, rate=0.02, weight_decay=weight_decay)
    frozen = model.frozen.detach().clone()
    made = make_optimizer(model, config(optim=optim, learning_rate=0.02, weight_decay=weight_decay))
    before = [model.matrix.detach().clone(), model.norm.detach().clone()]
    found = weights_after(made, model)
    for mine, exact, start in zip(found, expected, before, strict=True):
        torch.testing.assert_close(mine, exact, rtol=0, atol=1e-12)
        assert (mine - start).abs().max() > 0.01
    assert torch.equal(model.frozen, frozen)


def test_vectors_are_never_decayed() -> None:
    model = _Model()
    groups = make_optimizer(model, config(weight_decay=0.1)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {id(model.matrix): 0.1, id(model.norm): 0.0}
