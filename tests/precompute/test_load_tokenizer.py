"""The tokenizer of a folder is its tokenizer.json, whatever class its settings declare."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer
from dpo_opt.schemas.errors import ConfigError


def write_folder(folder: Path, declared: str) -> Path:
    """A byte-level tokenizer, declared as some class."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["Where is the town? It is in Europe."] * 20, trainer)
    backend.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": declared, **tokens}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.mark.parametrize("declared", ["LlamaTokenizerFast", "GemmaTokenizer", "CodeLlamaTokenizer"])
def test_a_tokenizer_that_is_rebuilt_with_other_ids_is_refused(tmp_path: Path, declared: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_tokenizer(write_folder(tmp_path, declared))
    own = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("Where is the town?\n").ids
    assert str(own[:8]) in refused.value.what
    assert refused.value.why is not None
    assert f"declares {declared}" in refused.value.why


@pytest.mark.parametrize("declared", ["PreTrainedTokenizerFast", "GPT2Tokenizer"])
def test_what_the_refusal_advises_gives_the_ids_of_the_file(tmp_path: Path, declared: str) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path, declared))
    text = "Is it\n\n in Europe? é 中 123"
    own = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer(text)["input_ids"] == own.encode(text).ids
