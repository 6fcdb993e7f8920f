import hashlib
from pathlib import Path
from typing import Any

import pytest
from model_edits import change_config
from refusals import refusal

from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.models import (
    checkpoint_dtype,
    config_digest,
    context_length,
    find_model,
    stated_context,
    template_digest,
    tokenizer_digest,
)


def test_a_model_folder_is_found(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_model(str(tiny_model)) == tiny_model
    monkeypatch.chdir(tiny_model.parent)
    assert find_model(tiny_model.name).samefile(tiny_model)
    monkeypatch.setenv("HOME", str(tiny_model.parent))
    assert find_model(f"~/{tiny_model.name}") == tiny_model


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "~/nowhere", "a/b/c", ""])
def test_a_folder_that_does_not_exist_is_named(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    if name:
        error = refusal(lambda: find_model(name))
        assert error.what == f"there is no model folder {name!r}"
    else:
        error = refusal(lambda: find_model(name))
    assert error.fix


@pytest.mark.parametrize("name", ["organisation/model", "not a/valid name", "models/none:latest"])
def test_a_name_that_the_hub_does_not_have_is_a_config_error(
    name: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    error = refusal(lambda: find_model(name))
    assert repr(name) in error.what
    assert "neither here nor to be had from the Hub" in error.what


def test_a_model_that_brings_its_own_code_is_refused(model: Path) -> None:
    change_config(model, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    assert "auto_map" in refusal(lambda: find_model(str(model))).what


def test_a_model_without_safetensors_is_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    error = refusal(lambda: find_model(str(model)))
    assert "no *.safetensors" in error.what
    assert "pickle" in str(error.why)


def test_a_folder_without_a_readable_config_is_refused(model: Path) -> None:
    for text, what in (("{", "not readable as JSON"), ("[]", "not a JSON object"), (b"\xff", "not readable")):
        (model / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        assert what in refusal(lambda: find_model(str(model))).what
    (model / "config.json").unlink()
    assert "no config.json" in refusal(lambda: find_model(str(model))).what


def test_the_config_digest_ignores_names_and_versions_only(tiny_model: Path, model: Path) -> None:
    change_config(
        model, transformers_version="4.0", torch_dtype="bfloat16", use_cache=False, _name_or_path="x"
    )
    assert config_digest(model) == config_digest(tiny_model)
    change_config(model, rms_norm_eps=1e-5)
    assert config_digest(model) != config_digest(tiny_model)


def test_the_context_and_the_declared_dtype_are_read_from_the_config(tiny_model: Path, model: Path) -> None:
    assert (context_length(tiny_model), checkpoint_dtype(tiny_model)) == (256, "float32")
    change_config(model, dtype=None, torch_dtype="bfloat16", max_position_embeddings=None)
    assert (context_length(model), checkpoint_dtype(model)) == (None, "bfloat16")
    change_config(model, torch_dtype=None)
    assert checkpoint_dtype(model) == "float32"


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_dtype_that_only_the_text_part_declares_counts(model: Path, name: str) -> None:
    change_config(model, dtype=None, torch_dtype=None, text_config={name: "bfloat16"})
    assert checkpoint_dtype(model) == "bfloat16"


def rope(**settings: Any) -> dict[str, Any]:
    return {"max_position_embeddings": 64, "rope_scaling": settings}


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({}, None),
        ({"max_position_embeddings": None}, None),
        ({"max_position_embeddings": 64}, 64),
        ({"n_positions": 128, "n_ctx": 64}, 128),
        ({"n_ctx": 64}, 64),
        ({"max_seq_len": 128}, 128),
        ({"seq_length": 128}, 128),
        ({"model_max_length": 128}, 128),
        ({"context_length": 128}, 128),
        ({"max_target_positions": 128}, 128),
        ({"max_position_embeddings": 64, "model_max_length": 128}, 64),
        ({"max_position_embeddings": 64, "model_max_length": 128, "rope_theta": 1e4}, 128),
        ({"text_config": {"max_position_embeddings": 64}, "max_position_embeddings": 8}, 64),
        ({"text_config": {"n_positions": 64}}, 64),
        ({"text_config": {}, "max_position_embeddings": 8}, 8),
        ({"text_config": None, "max_position_embeddings": 8}, 8),
        (rope(type="linear", factor=4.0), 256),
        (rope(rope_type="linear", factor=2.5), 160),
        (rope(type="dynamic", factor=2), 128),
        (rope(rope_type="default"), 64),
        (rope(type="linear", factor=None), 64),
        (rope(type="mrope", mrope_section=[16, 24, 24]), 64),
        (rope(type="su", short_factor=[1.0], long_factor=[4.0]), 64),
        (rope(type="longrope", factor=4.0), 64),
        (rope(rope_type="llama3", factor=8.0, original_max_position_embeddings=32), 64),
        (rope(type="yarn", factor=4.0), 256),
        (rope(type="yarn", factor=4.0, original_max_position_embeddings=16), 64),
        (rope(type="yarn", factor=4.0, original_max_position_embeddings=64), 256),
        (rope(rope_type="yarn", factor=4.0) | {"original_max_position_embeddings": 32}, 128),
        ({"max_position_embeddings": 64, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 256),
        ({"n_positions": 64, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 256),
        (
            {
                "text_config": {
                    "model_type": "olmo3",
                    "max_position_embeddings": 64,
                    "rope_parameters": {
                        "full_attention": {
                            "rope_type": "yarn",
                            "factor": 8.0,
                            "original_max_position_embeddings": 32,
                        },
                        "sliding_attention": {"rope_type": "default"},
                    },
                }
            },
            256,
        ),
        (
            {
                "model_type": "gemma3",
                "text_config": {
                    "model_type": "gemma3_text",
                    "max_position_embeddings": 64,
                    "rope_parameters": {
                        "full_attention": {"rope_type": "linear", "factor": 8.0},
                        "sliding_attention": {"rope_type": "default"},
                    },
                },
            },
            64,
        ),
        (rope(rope_type="linear", factor=8.0) | {"model_type": "gemma3_text"}, 64),
        ({"model_type": "gemma3", "text_config": rope(rope_type="linear", factor=8.0)}, 64),
    ],
)
def test_the_context_is_read_however_a_configuration_states_it(
    config: dict[str, Any], context: int | None
) -> None:
    assert stated_context(config) == context


def test_the_context_of_every_causal_model_of_transformers_is_read() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    compared, wrong = 0, []
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if kind.startswith(("musicgen", "gemma4_assistant")):
            continue  # has no configuration without those of its parts (gemma4_assistant: since 5.24)
        config = CONFIG_MAPPING[kind]()
        text = getattr(config, "text_config", config)
        states = getattr(text, "max_position_embeddings", None)
        if states == -1:
            states = None  # XLNet: as many as it gets
        found = stated_context(config.to_dict())
        compared += states is not None
        # A default configuration may come with scaled embeddings.
        if states is not None and (found is None or found < states):
            wrong.append((kind, states, found))
    assert compared > 100
    assert not wrong


def test_an_adapter_beside_a_whole_model_is_refused(model: Path) -> None:
    (model / "adapter_config.json").write_text("{}")
    error = refusal(lambda: find_model(str(model)))
    assert "a model and an adapter" in error.what
    assert "dpo-opt merge --model MODEL" in str(error.fix)


def test_the_tokenizer_digest_is_of_behaviour(tiny_model: Path, model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    right = tokenizer_digest(tokenizer)
    tokenizer(["a", "b c d"], padding=False, truncation=True, max_length=2)
    assert tokenizer_digest(tokenizer) == right
    tokenizer.save_pretrained(model)
    assert tokenizer_digest(AutoTokenizer.from_pretrained(model)) == right
    tokenizer.add_tokens(["<new>"])
    added = tokenizer_digest(tokenizer)
    other_end = AutoTokenizer.from_pretrained(tiny_model)
    other_end.eos_token = "<s>"
    assert len({right, added, tokenizer_digest(other_end)}) == 3


def test_the_template_digest_tells_templates_apart() -> None:
    assert template_digest({}) == "none"
    assert template_digest({"default": "{{ a }}"}) == hashlib.sha256(b"{{ a }}").hexdigest()
    named = [{"default": "a", "tool_use": "b"}, {"default": "a", "tool_use": "c"}, {"tool_use": "b"}]
    assert len({template_digest(templates) for templates in [{"default": "a"}, *named]}) == 4
    assert template_digest(dict(reversed(named[0].items()))) == template_digest(named[0])


@pytest.mark.parametrize("made", [True, False])
def test_a_missing_model_is_told_without_the_name_of_one_option(tmp_path: Path, made: bool) -> None:
    """Options of many names take a model: --model, --reference, --ches, --reward-model, --judge-model."""
    if made:
        (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError) as refused:
        find_model(str(tmp_path / "model"))
    assert str(refused.value.fix).startswith("pass ")
    assert "--" not in str(refused.value.fix)
