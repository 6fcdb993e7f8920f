"""State and gradients lie in the same places in every step, and the update is the same."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dpo_opt.optimize import TrainConfig
from dpo_opt.optimize.forward.device_path import standing_for_gpu
from dpo_opt.optimize.update.optimizer import make_optimizer
from dpo_opt.optimize.update.set_apart import set_apart

KINDS = [("adamw", torch.float32), ("rmsprop", torch.float32), ("adamw", torch.bfloat16)]


def trained(optim: str, dtype: torch.dtype, *, apart: bool) -> dict[str, Tensor]:
    """Parameters after three steps of two micro-batches; one of them has a gradient in the last step only."""
    generator = torch.Generator().manual_seed(0)
    model = nn.ParameterDict(
        {name: nn.Parameter(torch.randn(6, 5, generator=generator).to(dtype)) for name in ("a", "b", "late")}
    )
    config = TrainConfig(
        shards=Path("shards"), model="model", output_dir=Path("run"), optim=optim,  # type: ignore[arg-type]
        learning_rate=1e-2, weight_decay=0.1,
    )  # fmt: skip
    optimizer = make_optimizer(model, config)
    places = set_apart(optimizer) if apart else []
    state = {id(value) for held in optimizer.state.values() for value in held.values()}
    for step in range(3):
        names = ("a", "b", "late") if step == 2 else ("a", "b")
        for _ in range(2):
            factor = torch.randn(6, 5, generator=generator).to(dtype)
            torch.autograd.backward(sum((model[name] ** 3 * factor).sum() for name in names))
        if apart:
            assert [place is p.grad for place, p in zip(places, model.values(), strict=True)] == [
                name in names for name in model
            ]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if apart:
        assert state == {id(value) for held in optimizer.state.values() for value in held.values()}
    return {name: parameter.detach() for name, parameter in model.items()}


@pytest.mark.parametrize(("optim", "dtype"), KINDS)
def test_the_update_is_the_same(optim: str, dtype: torch.dtype) -> None:
    expected = trained(optim, dtype, apart=False)
    for name, found in trained(optim, dtype, apart=True).items():
        assert torch.equal(found, expected[name]), name


def test_a_gpu_is_left_to_its_own_allocator() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    with standing_for_gpu(True):
        assert set_apart(optimizer) == []
    assert not optimizer.state
