import json
import shutil
from pathlib import Path

import pytest
import torch
from model_edits import change_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dpo_opt.optimize.checkpoint.export import write_model
from dpo_opt.optimize.checkpoint.model_card import model_card
from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.forward.load_policy import load_policy
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.storage import publish_folder


def loaded(folder: Path) -> Policy:
    return load_policy(folder, dtype=torch.float32, device=torch.device("cpu"), trainable=True)


@pytest.fixture
def tokenizer_dir(tiny_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tiny_model / name, folder / name)
    return folder


def save(source: Path, path: Path, tokenizer_dir: Path) -> None:
    with publish_folder(path) as private:
        write_model(loaded(source), private, source=source, tokenizer_dir=tokenizer_dir, card="card")


def test_saving_without_training_keeps_every_weight(
    tiny_model: Path, tmp_path: Path, tokenizer_dir: Path
) -> None:
    save(tiny_model, tmp_path / "final", tokenizer_dir)
    before, after = (load_file(f / "model.safetensors") for f in (tiny_model, tmp_path / "final"))
    assert set(before) == set(after)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert (tmp_path / "final" / "README.md").read_text() == "card"


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path: Path, tokenizer_dir: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=270,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    save(tmp_path / "model", tmp_path / "final", tokenizer_dir)
    saved = load_file(tmp_path / "final" / "model.safetensors")
    assert sum(w.shape == (270, 64) for w in saved.values()) == 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    "settings",
    [
        # As Llama 2 and many others were released: transformers reads it, and refuses to write it.
        pytest.param(
            {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 1}, id="temperature without sampling"
        ),
        pytest.param({"do_sample": True, "repetition_penalty": 1.1, "eos_token_id": [0, 1]}, id="ordinary"),
    ],
)
def test_generation_settings_are_kept_as_they_were(
    model: Path, tmp_path: Path, tokenizer_dir: Path, settings: dict[str, object]
) -> None:
    (model / "generation_config.json").write_text(json.dumps(settings))
    save(model, tmp_path / "final", tokenizer_dir)
    assert json.loads((tmp_path / "final" / "generation_config.json").read_text()) == settings


def test_the_tokenizer_is_copied_byte_for_byte_and_what_is_no_part_of_it_is_not(
    model: Path, tmp_path: Path, tokenizer_dir: Path
) -> None:
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    (tokenizer_dir / "tokenizer.json").write_text(json.dumps(content, indent=5) + "\n\n")
    # As models had it before templates stood in files of their own, whose would count first.
    (tokenizer_dir / "chat_template.jinja").unlink()
    config = json.loads((tokenizer_dir / "tokenizer_config.json").read_text())
    (tokenizer_dir / "tokenizer_config.json").write_text(
        json.dumps({**config, "chat_template": "trained on"})
    )
    kept = {path.name: path.read_bytes() for path in tokenizer_dir.iterdir()}
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (tokenizer_dir / name).write_text("{}")
    (model / "chat_template.jinja").write_text("of the folder")
    save(model, tmp_path / "final", tokenizer_dir)
    assert {name: (tmp_path / "final" / name).read_bytes() for name in kept} == kept
    assert not (tmp_path / "final" / "chat_template.jinja").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "final").chat_template == "trained on"
    before, after = (load_file(f / "model.safetensors") for f in (model, tmp_path / "final"))
    assert set(before) == set(after)
    assert json.loads((tmp_path / "final" / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("templated", [True, False])
def test_what_prepares_images_and_sounds_is_kept_and_the_tokenizer_stays_as_it_was_trained_on(
    model: Path, tmp_path: Path, tokenizer_dir: Path, templated: bool
) -> None:
    names = {"preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"}
    names |= {"image_processor_config.json", "audio_tokenizer_config.json"}
    for name in names:
        (model / name).write_text(name)
    (model / "chat_template.jinja").write_text("of the folder")
    (model / "tokenizer_config.json").write_text("{}")
    (model / "notes.json").write_text("{}")
    template = (tokenizer_dir / "chat_template.jinja").read_text() if templated else "of the folder"
    if not templated:
        (tokenizer_dir / "chat_template.jinja").unlink()
    save(model, tmp_path / "final", tokenizer_dir)
    for name in names:
        assert (tmp_path / "final" / name).read_text() == name
    assert (tmp_path / "final" / "chat_template.jinja").read_text() == template
    assert (tmp_path / "final" / "tokenizer_config.json").read_text() != "{}"
    assert not (tmp_path / "final" / "notes.json").exists()


def test_the_card_says_which_rotary_embedding_was_fixed(shards: Path) -> None:
    config = TrainConfig(shards=shards, model="base", output_dir="run")
    manifest = ShardFolder.open(shards).manifest
    for rope, said in (("fixed", False), ("longrope:long", True)):
        changed = manifest.model_copy(
            update={"fingerprint": manifest.fingerprint.model_copy(update={"rope": rope})}
        )
        card = model_card(config, changed, None, steps=3, text_alone=False)
        assert ("| rotary embedding | longrope:long (fixed for the whole run) |\n" in card) == said
        assert card.endswith("|\n")
        assert ("rotary" in card) == said
        assert "text model" not in card


def test_a_folder_left_by_a_crash_does_no_harm(tiny_model: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    left = tmp_path / ".final.0badc0de.tmp"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    save(tiny_model, tmp_path / "final", tokenizer_dir)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "final").state_dict()
    expected = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    assert (left / "model.safetensors").read_text() == "half"


def test_settings_that_transformers_refuses_to_write_do_not_lose_the_run(
    model: Path, tmp_path: Path, tokenizer_dir: Path
) -> None:
    """As the first conversions of Llama have them, without a generation_config.json beside."""
    (model / "generation_config.json").unlink(missing_ok=True)
    change_config(model, pad_token_id=-1)
    save(model, tmp_path / "final", tokenizer_dir)
    assert json.loads((tmp_path / "final" / "config.json").read_text())["pad_token_id"] == -1
    assert not (tmp_path / "final" / "generation_config.json").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "final").generation_config.eos_token_id == 1
