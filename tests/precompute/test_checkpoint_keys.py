"""A checkpoint that holds more than its model is refused before an engine starts, whatever its names are."""

import json
import re
import resource
import struct
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fakes import preference_rows, write_jsonl
from model_edits import change_config, change_json, change_weights

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.engine import vllm_model
from dpo_opt.precompute.engine.checkpoint_keys import require_place_for_all_weights
from dpo_opt.precompute.engine.vllm_model import VllmModel
from dpo_opt.precompute.run import precompute
from dpo_opt.schemas import model_config
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.models import find_model
from dpo_opt.schemas.weights import refuse_left_over, weights_digest

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def add(folder: Path, **tensors: torch.Tensor) -> None:
    change_weights(folder, lambda found: found.update(tensors))


def refused(folder: Path) -> str | None:
    """What a checkpoint is refused for; None where it is not."""
    try:
        require_place_for_all_weights(folder)
    except ConfigError as error:
        return error.what
    return None


def biases(folder: Path) -> None:
    add(folder, **{f"model.layers.{i}.self_attn.q_proj.bias": torch.ones(128) for i in range(2)})


def fewer_layers(folder: Path) -> None:
    change_config(folder, num_hidden_layers=1)


@pytest.mark.parametrize(
    ("change", "count", "name"),
    [(biases, 2, "model.layers.0.self_attn.q_proj.bias"), (fewer_layers, 9, "model.layers.1.")],
)
@pytest.mark.parametrize("architectures", [["LlamaForCausalLM"], None])
def test_weights_that_the_model_has_no_place_for_are_refused(
    model: Path,
    change: Callable[[Path], None],
    count: int,
    name: str,
    architectures: list[str] | None,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert refused(model) is None
    change(model)
    change_config(model, architectures=architectures)
    capfd.readouterr()
    with pytest.raises(ConfigError, match=f"holds {count} weights that .* such as {name}") as caught:
        require_place_for_all_weights(model)
    assert caught.value.where == str(model)
    assert "config.json" in str(caught.value.fix)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
KINDS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "experts, joined at loading": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, **EXPERTS)
    ),
    "a head that is the embedding": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**SIZES, tie_word_embeddings=True)
    ),
    "a model that sees": lambda: transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config={**SIZES, "head_dim": 8, "query_pre_attn_scalar": 8},
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "image_size": 28,
                "patch_size": 14,
            },
            mm_tokens_per_image=4,
        )
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_as_it_was_saved_has_place_for_all(kind: str, tmp_path: Path) -> None:
    KINDS[kind]().save_pretrained(tmp_path)
    assert refused(tmp_path) is None
    # Names in the file are not always those of the model.
    add(tmp_path, **{"model.layers.7.mlp.gate.weight": torch.ones(2)})
    assert re.search(r"holds 1 weights .*layers\.7", str(refused(tmp_path)))


def test_masks_that_older_releases_stored_are_no_weights(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    mask = torch.ones(1, 1, 16, 16, dtype=torch.uint8)
    add(
        tmp_path,
        **{"transformer.h.0.attn.bias": mask, "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)},
    )
    assert refused(tmp_path) is None
    add(tmp_path, **{"transformer.h.0.attn.c_attn.other": torch.ones(2)})
    assert "holds 1 weights" in str(refused(tmp_path))


def test_what_transformers_does_not_know_is_left_to_the_engine(model: Path) -> None:
    biases(model)
    assert "holds 2 weights" in str(refused(model))
    change_config(model, architectures=["NobodyKnowsForCausalLM"])
    assert refused(model) is None
    change_config(model, architectures=["LlamaForCausalLM"], quantization_config={"quant_method": "unknown"})
    assert refused(model) is None


def test_no_weight_is_read(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SIZES | {"hidden_size": 8192, "intermediate_size": 28672})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        large = transformers.LlamaForCausalLM(config)
    header, end = {}, 0
    for name, tensor in [*large.state_dict().items(), ("model.other", torch.zeros(1))]:
        place = [end, end + 2 * tensor.numel()]
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": place}
        end = place[1]
    text = json.dumps(header).encode()
    # Zeros that take no place on the disk.
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + end)
    assert end > 3e9
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with pytest.raises(ConfigError, match=r"holds 1 weights .* model\.other"):
        require_place_for_all_weights(tmp_path)
    # A quarter of it, in pages of 4 KiB, would be more.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 200_000


@pytest.mark.vllm
def test_the_engine_does_not_start(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(**_: Any) -> Any:
        raise AssertionError("the engine started")

    monkeypatch.setattr(vllm_model, "_start", start)
    biases(model)
    data = write_jsonl(tmp_path / "data.jsonl", preference_rows(2))
    config = PrecomputeConfig(model=str(model), data=[str(data)], shards=tmp_path / "shards")
    with pytest.raises(ConfigError, match="2 weights that the model has no place for"):
        precompute(config, scorer=VllmModel(model, dtype="float32", max_length=64))


def with_head(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], object]:
    def add_head(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = change(weights["model.embed_tokens.weight"])

    return add_head


@pytest.mark.parametrize("stated", [True, None])
def test_a_head_of_its_own_that_config_ties_is_refused_and_the_fix_leads_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stated: bool | None
) -> None:
    """transformers scores it untied with a warning, vLLM leaves the head out."""
    # Where config.json says nothing, the class does: as Gemma's.
    tied = types.SimpleNamespace(get_text_config=lambda: types.SimpleNamespace(tie_word_embeddings=True))
    monkeypatch.setattr(model_config, "load_model_config", lambda folder: tied)
    change_weights(model, with_head(lambda table: table + 1))
    change_json(model / "config.json", lambda config: config.pop("tie_word_embeddings", None))
    if stated is not None:
        change_config(model, tie_word_embeddings=stated)
    with pytest.raises(ConfigError, match=r"lm_head\.weight and model\.embed_tokens\.weight hold") as caught:
        find_model(str(model))
    assert find_model(str(model), weights=False) == model
    command = str(caught.value.fix).partition(", then pass")[0]
    subprocess.run(["bash", "-ec", command], check=True, cwd=tmp_path)
    assert find_model(str(tmp_path / "MODEL")) == tmp_path / "MODEL"


def test_a_head_that_is_the_embedding_may_be_stored_and_an_untied_one_may_differ(model: Path) -> None:
    change_weights(model, with_head(torch.clone))
    change_config(model, tie_word_embeddings=True)
    assert find_model(str(model)) == model
    change_weights(model, with_head(lambda table: table + 1))
    change_config(model, tie_word_embeddings=False)
    assert find_model(str(model)) == model


@pytest.mark.parametrize(
    ("names", "way"),
    [
        (["v_head.summary.weight", "v_head.summary.bias"], "cp -rL "),
        (["score.weight"], "cp -rL "),
        (["model.layers.0.self_attn.q_proj.lora_A.weight", "v_head.weight"], "merge the adapter "),
        (["model.layers.7.mlp.up_proj.weight"], "correct config.json "),
        (["score.weight", "model.layers.7.mlp.up_proj.weight"], "correct config.json "),
    ],
)
def test_what_is_left_over_is_told_its_own_way_out(names: list[str], way: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="that the model has no place for") as caught:
        refuse_left_over(names, folder=tmp_path)
    assert str(caught.value.fix).startswith(way)


@pytest.mark.slow
def test_the_command_takes_a_value_head_out(model: Path, tmp_path: Path) -> None:
    before = weights_digest(model)
    add(model, **{"v_head.summary.weight": torch.ones(1, 8)})
    with pytest.raises(ConfigError, match=r"v_head\.summary") as caught:
        require_place_for_all_weights(model)
    command = str(caught.value.fix).partition(", then pass")[0]
    with_python = f"PATH={Path(sys.executable).parent}:$PATH; {command}"
    subprocess.run(["bash", "-ec", with_python], check=True, cwd=tmp_path)
    require_place_for_all_weights(tmp_path / "MODEL")
    assert weights_digest(tmp_path / "MODEL") == before
