"""Models that see or hear, trained on text: their text model changes, the rest is carried along untouched."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from all_architectures import auto_class, randomize, tiny_config
from fakes import scored_pairs
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from dpo_opt.commands.merge import MergeConfig
from dpo_opt.merge import merge
from dpo_opt.optimize import TrainConfig, train
from dpo_opt.optimize.adapters.lora import plan_adapter
from dpo_opt.optimize.forward.architecture import decoder_of
from dpo_opt.optimize.forward.balance import forward_cost
from dpo_opt.optimize.forward.load_policy import load_policy
from dpo_opt.optimize.memory.budget import Device
from dpo_opt.optimize.memory.count import count_memory
from dpo_opt.optimize.processes.distributed import World
from dpo_opt.optimize.stream import PairStream
from dpo_opt.optimize.throughput import Throughput
from dpo_opt.optimize.transformers_scorer import HfScorer
from dpo_opt.precompute import PrecomputeConfig, precompute
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.pairs import ScoredPair
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.weights import weights_digest

CPU = torch.device("cpu")
WORDS = 288  # at least as many ids as tiny_model's tokenizer has
WRAPPERS = ["gemma3", "gemma4", "gemma4_unified", "mistral3", "qwen2_5_vl"]
PROCESSOR = {
    "preprocessor_config.json": '{"image_size": 28}',
    "processor_config.json": '{"processor_class": "Gemma3Processor"}',
    "video_preprocessor_config.json": '{"fps": 2}',
    "chat_template.json": '{"chat_template": "of the processor"}',
}


def make(model_type: str, folder: Path, tokenizer: Path) -> Path:
    config = tiny_config(model_type)
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name in ("vocab_size", "vocab_size_per_layer_input"):
            if hasattr(part, name):
                setattr(part, name, WORDS)
    model = auto_class(model_type).from_config(config).float()
    randomize(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    for name, text in PROCESSOR.items():
        (folder / name).write_text(text)
    return folder


def score(model: Path, folder: Path) -> Path:
    folder.mkdir()
    rows = [{"prompt": f"{i % 4} cats", "chosen": f" sat {i}.", "rejected": " ran off"} for i in range(8)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PrecomputeConfig(
        model=str(model), data=folder / "pairs.jsonl", shards=folder / "shards", dtype="float32"
    )
    precompute(config, scorer=HfScorer(model, dtype="float32"))
    return config.shards


def settings(model: Path, shards: Path, **changes: Any) -> dict[str, Any]:
    return {
        **{"model": str(model), "shards": shards, "batch_size": 4, "learning_rate": 1e-3},
        **{"lr_scheduler_type": "constant", "max_steps": 2, "logging_steps": 1},
        **changes,
    }


@pytest.fixture(scope="module")
def gemma(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Gemma 3 with its vision tower, and shards scored with it."""
    root = tmp_path_factory.mktemp("gemma")
    model = make("gemma3", root / "model", tiny_model)
    return model, score(model, root / "scored")


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("model*.safetensors") for name, t in load_file(file).items()}


def text_parameters(model: PreTrainedModel) -> set[str]:
    """Names of what is trained."""
    trained = [*decoder_of(model).parameters(), *model.get_output_embeddings().parameters()]
    places = {id(parameter) for parameter in trained}
    return {name for name, parameter in model.named_parameters() if id(parameter) in places}


@pytest.mark.parametrize("model_type", [*WRAPPERS, "gemma4_text"])
def test_the_text_model_is_trained_and_the_rest_saved_as_it_was(
    tiny_model: Path, tmp_path: Path, model_type: str
) -> None:
    folder = make(model_type, tmp_path / "model", tiny_model)
    shards = score(folder, tmp_path / "scored")
    before = load_policy(folder, dtype=torch.float32, device=CPU, trainable=True).model
    trained = text_parameters(before)
    others = {name for name, _ in before.named_parameters()} - trained
    # At this size the unified Gemma 4 has no part that sees.
    assert bool(others) == (model_type not in ("gemma4_text", "gemma4_unified"))
    result = train(TrainConfig(**settings(folder, shards, output_dir=tmp_path / "run", save_steps=1)))
    assert result.steps == 2
    assert result.parity is not None
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    for saved in (result.final, checkpoint):
        assert set(weights(saved)) == set(weights(folder))
        after, report = type(before).from_pretrained(saved, dtype=torch.float32, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        start, end = dict(before.named_parameters()), dict(after.named_parameters())
        changed = {name for name, parameter in start.items() if not torch.equal(parameter, end[name])}
        assert changed
        assert changed <= trained
        assert json.loads((saved / "config.json").read_text())["architectures"] == [type(before).__name__]
    states = {
        name.rpartition(".")[0]
        for file in (checkpoint / "optimizer").glob("*.safetensors")
        for name in safe_open(file, framework="pt").keys()  # noqa: SIM118
    }
    assert states == trained


def test_a_run_goes_on_from_a_wrapper(gemma: tuple[Path, Path], tmp_path: Path) -> None:
    whole = train(TrainConfig(**settings(*gemma, output_dir=tmp_path / "whole")))
    first = settings(*gemma, output_dir=tmp_path / "run", max_steps=1, save_steps=1)
    train(TrainConfig(**first))
    resumed = train(TrainConfig(**{**first, "max_steps": 2}, resume=True))
    found, expected = weights(resumed.final), weights(whole.final)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_processor_goes_with_the_model(gemma: tuple[Path, Path], tmp_path: Path) -> None:
    result = train(TrainConfig(**settings(*gemma, output_dir=tmp_path / "run", save_steps=2)))
    for folder in (result.final, tmp_path / "run" / "checkpoints" / "step-00000002"):
        copied = {name: (folder / name).read_text() for name in PROCESSOR if (folder / name).exists()}
        # The tokenizer's own template is there already.
        assert copied == {name: text for name, text in PROCESSOR.items() if name != "chat_template.json"}
        assert (folder / "chat_template.jinja").is_file()


def test_the_card_says_what_was_trained(gemma: tuple[Path, Path], tmp_path: Path) -> None:
    for name, options in (("full", {}), ("lora", {"use_peft": True})):
        result = train(TrainConfig(**settings(*gemma, output_dir=tmp_path / name, **options)))
        assert "| trained | only the text model" in (result.final / "README.md").read_text()


def test_an_adapter_stays_in_the_text_model(gemma: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft import PeftModel

    chosen = settings(*gemma, output_dir=tmp_path / "run", use_peft=True, lora_r=4, learning_rate=1e-1)
    result = train(TrainConfig(**chosen))
    named = json.loads((result.final / "adapter_config.json").read_text())["target_modules"]
    assert len(named) == 4 * 7
    assert all(name.startswith("model.language_model.layers.") for name in named)
    assert set(load_file(result.final / "adapter_model.safetensors")) == {
        f"base_model.model.{name}.lora_{side}.weight" for name in named for side in "AB"
    }
    base = auto_class("gemma3").from_pretrained(gemma[0], dtype=torch.float32).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, result.final).eval()(input_ids=ids).logits
    assert (adapted - plain).abs().max() > 1e-2

    output = tmp_path / "merged"
    merge(MergeConfig(model=str(gemma[0]), adapter=result.final, output=output))
    assert (output / "preprocessor_config.json").is_file()
    merged = auto_class("gemma3").from_pretrained(output, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, adapted, rtol=0, atol=1e-3)

    # A second round starts from a reference with the adapter merged, which its digest says.
    shards = score(output, tmp_path / "again")
    on = {**chosen, "shards": shards, "adapter": result.final, "output_dir": tmp_path / "second"}
    second = train(TrainConfig(**on))
    assert second.parity is not None
    assert weights_digest(output) != weights_digest(gemma[0])


def planned(model: Path, *targets: str) -> tuple[str, ...]:
    config = TrainConfig(
        shards="unused", model=str(model), output_dir="unused", use_peft=True, lora_target_modules=targets
    )
    return plan_adapter(config, model).layers


def test_a_name_that_both_have_means_the_text_models(gemma: tuple[Path, Path]) -> None:
    pytest.importorskip("peft")
    layers = planned(gemma[0], "q_proj")
    assert layers == tuple(f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(4))


@pytest.mark.parametrize("target", ["fc1", "model.vision_tower.encoder.layers.0.self_attn.q_proj"])
def test_layers_of_the_vision_tower_are_refused(gemma: tuple[Path, Path], target: str) -> None:
    pytest.importorskip("peft")
    with pytest.raises(ConfigError, match=r"not run by text alone(.|\n)*pass some of: down_proj gate_proj"):
        planned(gemma[0], target)


@pytest.mark.parametrize("use_peft", [False, True])
def test_the_estimate_counts_what_is_trained(gemma: tuple[Path, Path], use_peft: bool) -> None:
    config = TrainConfig(
        shards="unused", model=str(gemma[0]), output_dir="unused", use_peft=use_peft, lora_r=4
    )
    memory = count_memory(config, gemma[0], scored_pairs((9, 20, 30)), rows=64, device=Device("cpu", None))
    model = load_policy(gemma[0], dtype=torch.float32, device=CPU, trainable=True).model
    whole = sum(p.numel() for p in model.parameters())
    text = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if use_peft:
        assert memory.trained == memory.parameters - whole < text / 4
    else:
        assert (memory.parameters, memory.trained) == (whole, text)
        assert memory.weights == pytest.approx(4 * whole, rel=0.01)
        assert memory.optimizer == pytest.approx(8 * text, rel=0.001)
    assert text < whole
    assert memory.activations is not None


def test_a_frozen_tower_is_no_frozen_text_model(
    gemma: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(time, "perf_counter", iter(range(100)).__next__)
    pairs = stream(gemma[1])
    found = []
    for trainable in (True, False):
        policy = load_policy(gemma[0], dtype=torch.float32, device=CPU, trainable=trainable)
        cost = forward_cost(policy)
        on_gpu = replace(policy, device=torch.device("cuda"), dtype=torch.bfloat16)
        throughput = Throughput(on_gpu, cost, World(0, 1, 0, CPU, None))
        throughput.add(pairs)
        found.append(throughput.metrics()["mfu"])
    # Backward is two forwards where weights are trained, and one where they are not.
    assert found[0] == pytest.approx(found[1] * 3 / 2)


def stream(shards: Path) -> list[ScoredPair]:
    pairs = PairStream(ShardFolder.open(shards), eval_split=0)
    return pairs.fetch(pairs.epoch(seed=0, epoch=0))
