"""State and gradients lie in the same places in every step, and the update is the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import HEADS, load, save_random
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_opt.optimize import TrainConfig
from dpo_opt.optimize.forward.architecture import head_of
from dpo_opt.optimize.forward.device_path import standing_for_gpu
from dpo_opt.optimize.forward.gradient_place import gradient_place
from dpo_opt.optimize.update.optimizer import make_optimizer
from dpo_opt.optimize.update.set_apart import set_apart
from dpo_opt.schemas.pairs import TokenSequence

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


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_adds_to_the_gradients_place(tmp_path: Path, tied: bool) -> None:
    save_random("LlamaConfig", {**HEADS, "tie_word_embeddings": tied}, tmp_path)
    rng = np.random.default_rng(0)
    prompt, short, long = (rng.integers(3, 90, size=size, dtype=np.int32) for size in (5, 9, 30))
    micro_batches = [[(TokenSequence(prompt, side),)] for side in (short, long)]

    def steps(*, apart: bool) -> list[dict[str, Tensor]]:
        """Gradients of two steps of both micro-batches."""
        policy = load(tmp_path)
        weight = head_of(policy.model).weight
        if apart:
            set_apart(torch.optim.AdamW(policy.model.parameters()))
            place = gradient_place(weight)
            assert place is not None
            # What lies there before is nothing's gradient.
            place.fill_(torch.nan)
        found = []
        for _ in range(2):
            for groups in micro_batches:
                torch.autograd.backward(policy.sequence_logps(groups)[0].sum())
            if apart:
                assert weight.grad is place
            parameters = dict(policy.model.named_parameters())
            found.append({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})
            policy.model.zero_grad(set_to_none=True)
        return found

    for expected, found in zip(steps(apart=False), steps(apart=True), strict=True):
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)


def test_no_gradient_is_made_beside_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random("LlamaConfig", {**HEADS, "tie_word_embeddings": True}, tmp_path)
    group = (TokenSequence(np.arange(3, 8, dtype=np.int32), np.arange(8, 30, dtype=np.int32)),)

    def made() -> int:
        """How many tensors of the head's shape a backward makes."""
        policy = load(tmp_path)
        weight = head_of(policy.model).weight
        set_apart(torch.optim.AdamW(policy.model.parameters()))
        logps = policy.sequence_logps([group])[0]
        with _Made(weight.shape) as counted:
            torch.autograd.backward(logps.sum())
        return counted.count

    assert made() == 0
    monkeypatch.setattr("dpo_opt.optimize.forward.logps.gradient_place", lambda _: None)
    assert made() > 0


class _Made(TorchDispatchMode):
    """Counts results of one shape that are no view or argument of the operation."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.count, self._shape = 0, shape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        held = {
            a.untyped_storage().data_ptr() for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor)
        }
        if isinstance(found, Tensor) and found.shape == self._shape:
            self.count += found.untyped_storage().data_ptr() not in held
        return found
