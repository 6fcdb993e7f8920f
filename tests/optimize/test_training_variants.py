"""Adapters and bf16 parameters through the whole loop: trained, stopped, resumed, saved, and gone on from."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import Interrupter
from transformers import AutoModelForCausalLM

from dpo_opt.commands.merge import MergeConfig
from dpo_opt.merge import merge
from dpo_opt.optimize import TrainConfig, train
from dpo_opt.optimize.transformers_scorer import HfScorer
from dpo_opt.precompute import PrecomputeConfig, precompute
from dpo_opt.schemas.errors import ConfigError, FingerprintError, Preempted
from dpo_opt.schemas.manifest import TOKENIZER, load_manifest, write_manifest
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.storage import file_names, sha256_folder

LORA = {"use_peft": True, "lora_r": 4, "learning_rate": 1e-2}
BF16 = {"param_dtype": "bfloat16", "dtype": "bfloat16", "learning_rate": 1e-3}


@pytest.fixture
def settings(shards: Path, tiny_model: Path) -> dict[str, Any]:
    return {
        "shards": shards,
        "model": str(tiny_model),
        "batch_size": 8,
        "micro_batch_tokens": 150,
        "logging_steps": 1,
    }


def weights(folder: Path) -> dict[str, bytes]:
    (file,) = folder.glob("*.safetensors")
    return {n: t.contiguous().view(torch.uint8).numpy().tobytes() for n, t in load_file(file).items()}


@pytest.mark.parametrize("kind", ["lora", "bf16"])
def test_interrupted_equals_uninterrupted_bit_for_bit(
    settings: dict[str, Any],
    bf16_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    chosen = {**settings, **LORA} if kind == "lora" else {**settings, **BF16, "shards": bf16_shards}
    whole = train(TrainConfig(**chosen, output_dir=tmp_path / "whole"))
    with monkeypatch.context() as patched:
        Interrupter(patched, at=7)
        with pytest.raises(Preempted):
            train(TrainConfig(**chosen, output_dir=tmp_path / "run"))
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert saved.name != "step-00000000"
    resumed = train(TrainConfig(**chosen, output_dir=tmp_path / "run", resume=True))
    assert weights(resumed.final) == weights(whole.final)
    assert resumed.last_metrics["loss"] == whole.last_metrics["loss"]


def test_an_adapter_learns_and_nothing_else_is_saved(settings: dict[str, Any], tmp_path: Path) -> None:
    result = train(
        TrainConfig(**settings, **LORA, output_dir=tmp_path / "run", num_train_epochs=3, save_steps=4)
    )
    assert result.last_metrics["loss"] < 0.6
    for folder in (result.final, *(tmp_path / "run" / "checkpoints").iterdir()):
        names = load_file(folder / "adapter_model.safetensors")
        assert names
        assert all(".lora_" in name for name in names)
        assert not (folder / "model.safetensors").exists()
    with ShardFolder.open(settings["shards"]).tokenizer() as tokenizer:
        files = {path.name: path.read_bytes() for path in tokenizer.iterdir()}
    assert {name: (result.final / name).read_bytes() for name in files} == files
    assert {path.name for path in result.final.iterdir()} == files.keys() | {
        *("adapter_config.json", "adapter_model.safetensors", "README.md")
    }
    assert "library_name: peft" in (result.final / "README.md").read_text()


def test_an_adapter_has_no_tokenizer_that_would_be_another_one_without_the_models_configuration(
    settings: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    shards = Path(shutil.copytree(settings["shards"], tmp_path / "shards"))
    tokenizer, manifest = shards / TOKENIZER, load_manifest(shards)
    (tokenizer / "config.json").write_text((tiny_model / "config.json").read_text() + "\n")
    names = {"tokenizer_sha256": sha256_folder(tokenizer), "tokenizer_files": file_names(tokenizer)}
    write_manifest(shards, manifest.model_copy(update=names))
    settings |= {"shards": shards, "max_steps": 1}
    adapter = train(TrainConfig(**settings, **LORA, output_dir=tmp_path / "adapter")).final
    assert {path.name for path in adapter.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md")
    }
    whole = train(TrainConfig(**settings, output_dir=tmp_path / "whole")).final
    of_tokenizer = set(names["tokenizer_files"]) - {"config.json"}
    assert all((whole / name).read_bytes() == (tokenizer / name).read_bytes() for name in of_tokenizer)
    assert (whole / "config.json").read_bytes() != (tokenizer / "config.json").read_bytes()


def test_a_second_round_from_an_adapter_needs_a_reference_with_it_merged(
    settings: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    first = train(TrainConfig(**settings, **LORA, output_dir=tmp_path / "first"))
    on = {**settings, **LORA, "adapter": first.final, "output_dir": tmp_path / "second"}
    with pytest.raises(FingerprintError, match="weights"):
        train(TrainConfig(**on))
    merged = tmp_path / "merged"
    merge(MergeConfig(model=str(tiny_model), adapter=first.final, output=merged))
    again = PrecomputeConfig(
        model=str(merged),
        data=settings["shards"].parent / "pairs.jsonl",
        shards=tmp_path / "again",
        dtype="float32",
    )
    precompute(again, scorer=HfScorer(merged, dtype="float32"))
    second = train(TrainConfig(**{**on, "shards": again.shards}, max_steps=1))
    assert second.last_metrics["loss"] == pytest.approx(0.693147, abs=1e-4)


def test_bf16_parameters_move_at_a_rate_that_plain_bf16_would_lose(
    settings: dict[str, Any], bf16_shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = TrainConfig(
        **{**settings, **BF16, "shards": bf16_shards, "learning_rate": 1e-5},
        output_dir=tmp_path / "run",
        lr_scheduler_type="constant",
    )
    result = train(config)
    before = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    after = AutoModelForCausalLM.from_pretrained(result.final, dtype=torch.bfloat16)
    moved = [
        (a != b).float().mean()
        for a, b in zip(before.parameters(), after.parameters(), strict=True)
        if a.ndim > 1
    ]
    assert 0.001 < float(torch.stack(moved).mean()) < 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"param_dtype": "bfloat16", "dtype": "float32"}, "--dtype bfloat16"),
        ({"lora_target_modules": ["q_proj"]}, "--use-peft"),
        ({**BF16, "optim": "rmsprop"}, "rmsprop"),
        # Not the other way out, which would be refused.
        (
            {"param_dtype": "bfloat16", "dtype": "float32", "optim": "rmsprop"},
            "fix: leave --param-dtype out\n",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    settings: dict[str, Any], tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        train(TrainConfig(**settings, **change, reference_differs=True, output_dir=tmp_path / "run"))
    assert said in f"{caught.value}\n"
