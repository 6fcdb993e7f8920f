"""TRL's settings, read: the same training here, and what has no effect is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from dpo_opt.cli import main
from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.losses.usable import require_usable_losses
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.trl_config import TrlConfig, read_trl_config


def read(folder: Path, **values: Any) -> TrlConfig:
    (folder / "trl.yaml").write_text(yaml.safe_dump(values))
    return read_trl_config(folder / "trl.yaml")


def config_of(found: TrlConfig) -> TrainConfig:
    return TrainConfig.model_validate({"shards": "s", "model": "m", "output_dir": "o", **found.settings})


def test_the_defaults_of_trl_train_as_trl_says(tmp_path: Path) -> None:
    config = config_of(read(tmp_path))
    assert (config.num_train_epochs, config.batch_size) == (3, 8)
    assert (config.activation_checkpointing, config.save_steps) == ("full", 500)
    assert config.loss_type == ["sigmoid"]


def test_a_pairs_per_step_is_a_product(tmp_path: Path) -> None:
    found = read(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=16)
    assert found.settings["batch_size"] == 64


NAMES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "model": ({"model_name_or_path": "org/m"}, {"model": "org/m"}),
    "optimizer": ({"optim": "adamw_bnb_8bit"}, {"optim": "adamw-8bit"}),
    "schedule": ({"lr_scheduler_type": "constant_with_warmup"}, {"lr_scheduler_type": "constant"}),
    "warm-up as a share": ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
    "steps": ({"max_steps": 7}, {"max_steps": 7}),
    "no saving by steps": ({"save_strategy": "no"}, {"save_steps": None}),
    "the best": ({"metric_for_best_model": "loss"}, {"metric_for_best_model": "eval_loss"}),
    "no recomputation": ({"gradient_checkpointing": False}, {"activation_checkpointing": "selective"}),
    "bf16": ({"bf16": True}, {"dtype": "bfloat16"}),
    "several losses": (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.1]},
        {"loss_weights": [1.0, 0.1]},
    ),
    "smoothing that TRL reads": ({"loss_type": "robust", "label_smoothing": 0.1}, {"label_smoothing": 0.1}),
    "smoothed ranks": ({"loss_type": "aot", "label_smoothing": 0.1}, {"label_smoothing": 0.1}),
    "MPO": (
        {"loss_type": ["sigmoid", "bco_pair", "sft"]},
        {"loss_type": ["sigmoid", "bco_pair", "sft"]},
    ),
    "LD-DPO and WPO": (
        {"ld_alpha": 0.5, "use_weighting": True},
        {"ld_alpha": 0.5, "use_weighting": True},
    ),
    "another divergence": ({"f_divergence_type": "js_divergence"}, {"f_divergence_type": "js_divergence"}),
    "its own default": ({"f_divergence_type": "reverse_kl", "discopop_tau": 0.05}, {"discopop_tau": None}),
    "one tracker": ({"report_to": "wandb"}, {"report_to": ["wandb"]}),
    "several trackers": ({"report_to": ["tensorboard", "mlflow"]}, {"report_to": ["tensorboard", "mlflow"]}),
    "no tracker": ({"report_to": "none"}, {"report_to": []}),
    "adapter": ({"use_peft": True, "lora_r": 8, "lora_dropout": 0.0}, {"lora_r": 8}),
}


@pytest.mark.parametrize("name", NAMES)
def test_other_names_and_values_mean_the_same(name: str, tmp_path: Path) -> None:
    values, expected = NAMES[name]
    found = read(tmp_path, **values)
    config = TrainConfig.model_validate({"shards": "s", "model": "m", "output_dir": "o", **found.settings})
    assert {setting: getattr(config, setting) for setting in expected} == expected
    assert found.not_taken == {}


def test_what_has_no_effect_is_named_with_what_to_do(tmp_path: Path) -> None:
    found = read(
        tmp_path, max_length=1024, dataset_name="org/d", label_smoothing=0.1, eval_strategy="steps", beta=0.2,
        something_new=3, report_to=["wandb", "comet_ml"], dataloader_num_workers=4,
    )  # fmt: skip
    assert found.settings["beta"] == 0.2
    assert "label_smoothing" not in found.settings
    assert sorted(found.not_taken) == sorted(
        ["max_length", "dataset_name", "label_smoothing", "eval_strategy", "something_new", "report_to"]
    )
    assert "dpo-opt precompute" in found.not_taken["max_length"]


@pytest.mark.parametrize("name", ["sync_ref_model", "neftune_noise_alpha"])
def test_what_would_train_something_else_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=name):
        read(tmp_path, **{name: 0.5})


@pytest.mark.parametrize("text", ["[1]", "a: b: c", "{", "1: 2"])
def test_a_file_that_holds_no_settings_is_named(text: str, tmp_path: Path) -> None:
    for name in ("trl.yaml", "trl.json"):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=name):
            read_trl_config(tmp_path / name)


def test_a_whole_dpo_config_says_nothing_about_its_defaults(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    file = tmp_path / "dpo.json"
    file.write_text(trl.DPOConfig(output_dir="run", use_cpu=True, bf16=False, beta=0.3).to_json_string())
    found = read_trl_config(file)
    assert sorted(found.not_taken) == ["max_length", "truncation_mode"]
    config = config_of(found)
    assert (config.beta, config.batch_size, config.num_train_epochs) == (0.3, 8, 3)
    assert (config.learning_rate, config.optim, config.max_steps) == (1e-6, "adamw", None)
    assert config.loss_type == ["sigmoid"]


def test_a_whole_kto_config_trains_kto(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    file = tmp_path / "kto.json"
    config = trl.KTOConfig(output_dir="run", use_cpu=True, bf16=False, desirable_weight=1.3)
    file.write_text(config.to_json_string())
    found = read_trl_config(file)
    assert set(found.not_taken) == {"max_length"}
    read_back = config_of(found)
    require_usable_losses(read_back)
    assert (read_back.loss_type, read_back.loss_options) == (["kto"], {"desirable_weight": 1.3})


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "dpo.json"
    file.write_text(json.dumps({"beta": 0.3, "learning_rate": -1, "max_length": 5}))
    arguments = ["train", "--trl-config", str(file), "--shards", "s", "--model", "m", "--output-dir", "o"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "--learning-rate -1" in result.stderr
    assert "--trl-config: max_length is not taken" in result.stderr
    result = CliRunner().invoke(main, [*arguments, "--learning-rate", "1e-5"])
    assert "--learning-rate" not in result.stderr
