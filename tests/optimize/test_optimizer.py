import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from dpo_opt.optimize import TrainConfig
from dpo_opt.optimize.update.optimizer import learning_rate, make_optimizer, set_learning_rate
from dpo_opt.schemas.errors import ConfigError


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


@pytest.mark.parametrize(
    ("share", "total_steps", "steps"),
    [(0.1, 30, 3), (0.1, 25, 3), (0.07, 100, 7), (0.29, 100, 29), (0.001, 10, 1), (0.999, 5, 5), (0.0, 9, 0)],
)
def test_a_warm_up_below_one_is_a_share_of_all_steps_rounded_up(
    share: float, total_steps: int, steps: int
) -> None:
    rising = [(step + 1) / steps for step in range(steps)]
    found = rates(total_steps, lr_scheduler_type="constant", warmup_steps=share)
    assert found == pytest.approx(rising + [1.0] * (total_steps - steps))


@pytest.mark.parametrize(("given", "steps"), [(1, 1), (2.9, 2)])
def test_a_warm_up_from_one_on_is_whole_steps(given: float, steps: int) -> None:
    assert rates(4, lr_scheduler_type="linear", warmup_steps=given) == rates(4, warmup_steps=steps)
    assert rates(4, warmup_steps=given)[:steps] == pytest.approx([(s + 1) / steps for s in range(steps)])


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


def by_hand(
    model: _Model,
    *,
    optim: str,
    rate: float,
    weight_decay: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    steps: int = 5,
) -> list[Tensor]:
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
                first[i] = beta1 * first[i] + (1 - beta1) * grad
                second[i] = beta2 * second[i] + (1 - beta2) * grad**2
                corrected = first[i] / (1 - beta1**t), second[i] / (1 - beta2**t)
                values[i] = values[i] - rate * corrected[0] / (corrected[1].sqrt() + epsilon)
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


def test_betas_and_epsilon_are_the_configured_ones() -> None:
    model = _Model().double()
    decays = {"beta1": 0.8, "beta2": 0.95, "epsilon": 0.01}
    expected = by_hand(model, optim="adamw", rate=0.02, weight_decay=0.1, **decays)
    named = {f"adam_{name}": value for name, value in decays.items()}
    made = make_optimizer(model, config(learning_rate=0.02, weight_decay=0.1, **named))
    for mine, exact in zip(weights_after(made, model), expected, strict=True):
        torch.testing.assert_close(mine, exact, rtol=0, atol=1e-12)


@pytest.fixture
def torchao(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torchao's own code, line by line: compiling it takes half a minute (the slow test below does)."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("optim", "adamw-8bit") != "adamw-8bit":
        yield
        return
    pytest.importorskip("torchao.optim", reason="torchao is not installed: pip install 'dpo-opt[torchao]'")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    # vLLM's CPU build switches it off for all that shares its process.
    with torch._dynamo.config.patch(disable=False):
        yield


def _weights(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    return nn.ParameterDict({"w": nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(dtype))})


def _descend(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int) -> Tensor:
    (weight,) = model.parameters()
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        weight.grad = (torch.randn(weight.shape, generator=generator) + 1).to(weight.dtype)
        optimizer.step()
    return weight.detach()


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_eight_bit_steps_are_adamws_up_to_its_quantization(weight_decay: float) -> None:
    settings: dict[str, Any] = {
        "learning_rate": 1e-3, "weight_decay": weight_decay, "adam_beta1": 0.8, "adam_beta2": 0.95,
    }  # fmt: skip
    start = next(_weights(64, 128).parameters()).detach()
    moves = []
    for optim in ("adamw", "adamw-8bit"):
        model = _weights(64, 128)
        moves.append(_descend(make_optimizer(model, config(optim=optim, **settings)), model, 10) - start)
    full, eight_bit = moves
    assert 0 < (eight_bit - full).norm() / full.norm() < 0.05


@pytest.mark.usefixtures("torchao")
def test_eight_bit_moments_take_a_byte_each() -> None:
    model = _weights(64, 128)
    made = make_optimizer(model, config(optim="adamw-8bit"))
    _descend(made, model, 1)
    (state,) = made.state.values()
    assert {state[name].codes.dtype for name in ("exp_avg", "exp_avg_sq")} == {torch.uint8}


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("optim", ["adamw", "adamw-8bit"])
def test_small_updates_of_bfloat16_parameters_are_not_lost(optim: str) -> None:
    def moves(dtype: torch.dtype) -> Tensor:
        model = _weights(64, 1024, dtype=dtype)
        before = next(model.parameters()).detach().clone()
        made = make_optimizer(model, config(optim=optim, learning_rate=1e-6))
        return _descend(made, model, 20).double() - before.double()

    found, exact = moves(torch.bfloat16), moves(torch.float32)
    # Most weights' neighbours are 6e-5 or 1e-4 away, and they are to go 2e-5.
    assert float(found.mean()) == pytest.approx(float(exact.mean()), rel=0.15)
    # With the same bits at every step, the same few would be moved again and again.
    assert float((found != 0).double().mean()) > 0.15


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("shape", [(64, 128), (5, 3)])
def test_eight_bit_rounding_is_the_seeds_wherever_the_generator_stands(shape: tuple[int, int]) -> None:
    def weights(seed: int) -> Tensor:
        model = _weights(*shape, dtype=torch.bfloat16)
        made = make_optimizer(model, config(optim="adamw-8bit", learning_rate=1e-4, seed=seed))
        before = torch.get_rng_state()
        result = _descend(made, model, 3)
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(5)
        (state,) = made.state.values()
        assert {state[name].dtype for name in ("exp_avg", "exp_avg_sq")} == {torch.float32}
        return result

    first = weights(seed=0)
    assert torch.equal(weights(seed=0), first)
    assert not torch.equal(weights(seed=1 << 40), first)


@pytest.mark.slow
def test_eight_bit_steps_are_compiled_and_repeat_themselves() -> None:
    pytest.importorskip("torchao.optim", reason="torchao is not installed: pip install 'dpo-opt[torchao]'")
    results = []
    with torch._dynamo.config.patch(disable=False):
        for _ in range(2):
            model = _weights(64, 128, dtype=torch.bfloat16)
            made = make_optimizer(model, config(optim="adamw-8bit", learning_rate=1e-4))
            set_learning_rate(made, 1e-3)
            results.append(_descend(made, model, 3))
            torch.rand(5)
    assert torch.equal(*results)
    assert (results[0] - next(_weights(64, 128).parameters()).detach()).abs().mean() == pytest.approx(
        3e-3, rel=0.3
    )


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("optim", ["adamw", "rmsprop", "adamw-8bit"])
def test_the_rate_that_was_set_is_used(optim: str) -> None:
    moved = []
    for rate in (None, 3e-3):
        model = _weights(5, 3)
        before = next(model.parameters()).detach().clone()
        made = make_optimizer(model, config(optim=optim, learning_rate=1e-3))
        if rate is not None:
            set_learning_rate(made, rate)
        moved.append(_descend(made, model, 1) - before)
    torch.testing.assert_close(moved[1], 3 * moved[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("optim", "dtype", "said"),
    [
        ("rmsprop", torch.bfloat16, "rmsprop does not go with bfloat16 parameters"),
        ("adamw", torch.float16, "float16 parameters cannot be trained"),
        ("adamw-8bit", torch.float16, "float16 parameters cannot be trained"),
    ],
)
def test_what_would_lose_updates_is_refused(optim: str, dtype: torch.dtype, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        make_optimizer(_weights(5, 3, dtype=dtype), config(optim=optim))
    assert "--param-dtype float32" in str(caught.value.fix)


def test_one_bfloat16_parameter_is_enough_to_refuse() -> None:
    mixed = nn.ModuleList([_weights(5, 3), _weights(5, 3, dtype=torch.bfloat16)])
    with pytest.raises(ConfigError, match="rmsprop"):
        make_optimizer(mixed, config(optim="rmsprop"))


def test_a_missing_torchao_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ConfigError, match="torchao, which is not installed") as caught:
        make_optimizer(_weights(5, 3), config(optim="adamw-8bit"))
    assert caught.value.fix == "pip install 'dpo-opt[torchao]'"


@pytest.mark.usefixtures("torchao")
def test_a_missing_compiler_is_named_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="'no-such-compiler' is not on the PATH"):
        make_optimizer(_weights(5, 3), config(optim="adamw-8bit"))


@pytest.mark.usefixtures("torchao")
def test_compiling_that_is_switched_off_is_named() -> None:
    with (
        torch._dynamo.config.patch(disable=True),
        pytest.raises(ConfigError, match=r"needs torch\.compile, which is switched off"),
    ):
        make_optimizer(_weights(5, 3), config(optim="adamw-8bit"))


@pytest.fixture
def spread() -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Makes a model's parameters those of a run of several processes (here of one)."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def distribute(model: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", (1,))
        whole = {name: p.detach() for name, p in model.named_parameters()}
        return nn.ParameterDict(
            {name: nn.Parameter(distribute_tensor(p, mesh, [Replicate()])) for name, p in whole.items()}
        )

    yield distribute
    dist.destroy_process_group()


def test_eight_bits_are_refused_over_several_processes(spread: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(ConfigError, match="does not go with several processes"):
        make_optimizer(spread(_weights(5, 3)), config(optim="adamw-8bit"))
