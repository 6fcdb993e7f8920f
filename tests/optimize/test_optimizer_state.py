from collections.abc import Callable, Iterator
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchrun_steps import ALONE

from dpo_opt.optimize import TrainConfig
from dpo_opt.optimize.checkpoint.state_files import load_state, own_files, save_state
from dpo_opt.optimize.update.optimizer import make_optimizer, set_learning_rate
from dpo_opt.optimize.update.optimizer_state import optimizer_tensors
from dpo_opt.schemas.errors import DataError

KINDS = {
    "adamw": ("adamw", torch.float32),
    "rmsprop": ("rmsprop", torch.float32),
    "adamw in bfloat16": ("adamw", torch.bfloat16),
    "adamw-8bit": ("adamw-8bit", torch.float32),
    "adamw-8bit in bfloat16": ("adamw-8bit", torch.bfloat16),
}


class Run:
    """A model and its optimizer, stepped on gradients that only the step decides."""

    def __init__(self, kind: str) -> None:
        optim, dtype = KINDS[kind]
        generator = torch.Generator().manual_seed(0)
        shapes = {"matrix": (64, 64), "vector": (7,), "late": (5, 3)}
        self.model = nn.ParameterDict(
            {n: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in shapes.items()}
        )
        config = TrainConfig(
            shards=Path("shards"), model="model", output_dir=Path("run"), optim=optim,  # type: ignore[arg-type]
            learning_rate=1e-3, weight_decay=0.1,
        )  # fmt: skip
        self.optimizer: Optimizer = make_optimizer(self.model, config)

    @property
    def names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self.model.named_parameters()}

    def step(self, steps: range) -> None:
        for step in steps:
            for i, (name, p) in enumerate(sorted(self.model.named_parameters())):
                generator = torch.Generator().manual_seed(100 * step + i)
                gradient = torch.randn(p.shape, generator=generator).to(p.dtype)
                # One parameter has no gradient before the fifth step.
                p.grad = gradient if name != "late" or step >= 4 else None
            set_learning_rate(self.optimizer, 1e-3 / (step + 1))
            self.optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        tensors = optimizer_tensors(self.optimizer, self.names)
        return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Run]]:
    """Makes a run; torchao's part of it is not compiled, which takes half a minute."""

    def make(kind: str) -> Run:
        if "8bit" in kind:
            pytest.importorskip(
                "torchao.optim", reason="torchao is not installed: pip install 'dpo-opt[torchao]'"
            )
            monkeypatch.setattr(torch, "compile", lambda function, **options: function)
        return Run(kind)

    # vLLM's CPU build switches it off for all that shares its process.
    with torch._dynamo.config.patch(disable=False):
        yield make


def require_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("stopped_after", [0, 3, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_goes_on_is_one_that_never_stopped(
    begin: Callable[[str], Run], tmp_path: Path, kind: str, stopped_after: int
) -> None:
    whole = begin(kind)
    whole.step(range(8))

    first = begin(kind)
    first.step(range(stopped_after))
    save_state(
        tmp_path / "optimizer", own_files(optimizer_tensors(first.optimizer, first.names), ALONE), ALONE
    )

    second = begin(kind)
    second.model.load_state_dict(first.model.state_dict())
    torch.rand(11)
    load_state(tmp_path / "optimizer", optimizer_tensors(second.optimizer, second.names), ALONE)
    second.step(range(stopped_after, 8))

    require_equal(dict(second.model.state_dict()), dict(whole.model.state_dict()))
    require_equal(second.tensors(), whole.tensors())


@pytest.mark.parametrize("kind", KINDS)
def test_without_its_state_an_optimizer_goes_on_otherwise(begin: Callable[[str], Run], kind: str) -> None:
    whole, second = begin(kind), begin(kind)
    whole.step(range(3))
    second.model.load_state_dict(whole.model.state_dict())
    for run in (whole, second):
        run.step(range(3, 4))
    assert not torch.equal(whole.model["matrix"], second.model["matrix"])


@pytest.mark.parametrize("kind", KINDS)
def test_reading_the_state_changes_nothing(begin: Callable[[str], Run], kind: str) -> None:
    run = begin(kind)
    run.step(range(2))
    assert run.model["late"].grad is None
    gradients = {name: p.grad for name, p in run.model.named_parameters()}
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    rates = [float(group["lr"]) for group in run.optimizer.param_groups]
    run.tensors()
    assert all(p.grad is gradients[name] for name, p in run.model.named_parameters())
    require_equal({name: p.detach() for name, p in run.model.named_parameters()}, before)
    assert [float(group["lr"]) for group in run.optimizer.param_groups] == rates


def test_entries_are_named_after_the_models_parameters(begin: Callable[[str], Run]) -> None:
    run = begin("adamw")
    run.step(range(2))
    tensors = run.tensors()
    assert set(tensors) == {
        f"{name}.{entry}"
        for name in ("matrix", "vector", "late")
        for entry in ("step", "exp_avg", "exp_avg_sq")
    }
    assert [float(tensors[f"{name}.step"]) for name in ("matrix", "vector", "late")] == [2, 2, 0]
    assert not tensors["late.exp_avg_sq"].any()


def test_bfloat16_parameters_keep_their_moments_in_bfloat16(begin: Callable[[str], Run]) -> None:
    tensors = begin("adamw in bfloat16").tensors()
    assert {t.dtype for name, t in tensors.items() if "exp_avg" in name} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("saved", "kind"),
    # With 8 bits, moments of parameters in bfloat16 are no different.
    [pair for pair in permutations(KINDS, 2) if not all("8bit" in kind for kind in pair)],
)
def test_state_of_another_optimizer_is_refused_and_changes_nothing(
    begin: Callable[[str], Run], tmp_path: Path, saved: str, kind: str
) -> None:
    first, second = begin(saved), begin(kind)
    first.step(range(5))
    save_state(tmp_path / "optimizer", own_files(first.tensors(), ALONE), ALONE)
    before = second.tensors()
    with pytest.raises(DataError, match="the saved optimizer state does not fit"):
        load_state(tmp_path / "optimizer", optimizer_tensors(second.optimizer, second.names), ALONE)
    require_equal(second.tensors(), before)
