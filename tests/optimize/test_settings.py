"""Settings at the edges of what they may be, and beyond."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor
from training_runs import Interrupter

from dpo_opt.cli import main
from dpo_opt.commands.kl import KLConfig
from dpo_opt.optimize import TrainConfig, train
from dpo_opt.optimize.processes.distributed import clip_gradients
from dpo_opt.schemas.errors import Preempted
from dpo_opt.schemas.settings import Settings

GREATEST_SEED = 2**64 - 1


def training(**others: Any) -> TrainConfig:
    return TrainConfig(shards=Path("shards"), model="model", output_dir=Path("run"), **others)


def kl(**others: Any) -> KLConfig:
    return KLConfig(model="a", reference="b", prompts=Path("p.jsonl"), output=Path("o.parquet"), **others)


@pytest.fixture
def short(settings: dict[str, Any]) -> dict[str, Any]:
    """Two steps without evaluation."""
    return {
        **settings,
        "max_steps": 2,
        "eval_split": 0.0,
        "eval_steps": None,
        "metric_for_best_model": None,
        "logging_steps": 1,
        "save_steps": None,
    }


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "final" / "model.safetensors")


def equal(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, others[name]) for name, tensor in some.items())


@pytest.mark.parametrize("make", [training, kl])
@pytest.mark.parametrize(
    ("seed", "said"), [(-1, "greater than or equal to 0"), (2**64, f"less than {2**64}")]
)
def test_a_seed_that_no_generator_takes_is_refused(
    make: Callable[..., Settings], seed: int, said: str
) -> None:
    with pytest.raises(ValidationError, match=said):
        make(seed=seed)


def test_the_command_line_says_what_is_wrong_with_a_seed(tmp_path: Path) -> None:
    needed = ["--shards", str(tmp_path), "--model", "m", "--output-dir", str(tmp_path / "run")]
    result = CliRunner().invoke(main, ["train", *needed, "--seed", "-1"])
    assert result.exit_code == 2
    assert "--seed -1: Input should be greater than or equal to 0" in result.output


def test_the_greatest_seed_trains_and_goes_on(
    short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(TrainConfig(**short, seed=GREATEST_SEED, output_dir=tmp_path / "whole"))
    run = tmp_path / "stopped"
    with monkeypatch.context() as patched:
        Interrupter(patched, at=9)
        with pytest.raises(Preempted, match="after step 1"):
            train(TrainConfig(**short, seed=GREATEST_SEED, output_dir=run))
    said = yaml.safe_load((run / "config.resolved.yaml").read_text())
    train(TrainConfig.model_validate({**said, "resume": True}))
    assert equal(weights(run), weights(tmp_path / "whole"))


@pytest.mark.parametrize(
    "name", ["beta", "learning_rate", "warmup_steps", "adam_epsilon", "weight_decay", "label_smoothing"]
)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_setting_that_is_no_number_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValidationError, match=name):
        training(**{name: value})


def test_a_norm_of_0_or_infinity_clips_nothing(short: dict[str, Any], tmp_path: Path) -> None:
    found = {}
    for number, norm in enumerate((0.0, math.inf, 1e9, 0.01)):
        run = tmp_path / str(number)
        # The paper's RMSprop: AdamW's first steps are the same for gradients of any size.
        train(TrainConfig(**short, optim="rmsprop", max_grad_norm=norm, output_dir=run))
        found[norm] = weights(run)
    assert equal(found[0.0], found[1e9])
    assert equal(found[math.inf], found[1e9])
    assert not equal(found[0.0], found[0.01])


@pytest.mark.parametrize("norm", [0.0, math.inf])
def test_gradients_that_are_not_clipped_are_left_as_they_are(norm: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([3.0, 0.0, -4.0])
    assert clip_gradients([parameter], norm).item() == 5.0
    assert parameter.grad.tolist() == [3.0, 0.0, -4.0]


def test_a_run_without_clipping_goes_on_from_its_own_configuration(
    short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        Interrupter(patched, at=9)
        with pytest.raises(Preempted, match="after step 1"):
            train(TrainConfig(**short, max_grad_norm=math.inf, output_dir=run))
    said = yaml.safe_load((run / "config.resolved.yaml").read_text())
    assert train(TrainConfig.model_validate({**said, "resume": True})).steps == 2


@pytest.mark.parametrize("optim", ["adamw", "rmsprop"])
def test_a_rate_of_0_measures_and_trains_nothing(
    short: dict[str, Any], tmp_path: Path, tiny_model: Path, optim: str
) -> None:
    given = {**short, "learning_rate": 0.0, "weight_decay": 0.1}
    result = train(TrainConfig(**given, optim=optim, output_dir=tmp_path / "run"))
    assert result.last_metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert result.last_metrics["grad_norm"] > 0
    assert equal(weights(tmp_path / "run"), load_file(tiny_model / "model.safetensors"))


@pytest.mark.parametrize("name", ["max_grad_norm", "save_minutes"])
def test_a_setting_whose_help_says_inf_takes_it_and_no_nan(name: str) -> None:
    needed = {"shards": "s", "model": "m", "output_dir": "o"}
    assert " inf: " in str(TrainConfig.model_fields[name].description)
    assert getattr(TrainConfig.model_validate({**needed, name: "inf"}), name) == math.inf
    with pytest.raises(ValueError, match=name):
        TrainConfig.model_validate({**needed, name: "nan"})
