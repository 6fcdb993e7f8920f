"""The tokenizer of a folder is its tokenizer.json, whatever class its settings declare."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from dpo_opt.precompute.tokens.load_tokenizer import _refuse_other_ids, load_tokenizer
from dpo_opt.precompute.tokens.special_tokens import special_tokens
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.plain_data import json_of


def write_folder(folder: Path, declared: str, *, words: str = "Where is the town? It is in Europe.") -> Path:
    """A byte-level tokenizer, declared as some class."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([words] * 20, trainer)
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


def test_tokenizer_json_is_parsed_once_beside_the_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have more than ten megabytes."""
    folder = write_folder(tmp_path, "PreTrainedTokenizerFast")
    own = (folder / "tokenizer.json").read_text(encoding="utf-8")
    parsed: list[str] = []

    def recording(text: str) -> Any:
        parsed.append(text)
        return json_of(text)

    for module in ("load_tokenizer", "special_tokens"):
        monkeypatch.setattr(f"dpo_opt.precompute.tokens.{module}.json_of", recording)
    tokenizer = load_tokenizer(folder)
    assert own not in parsed
    assert special_tokens(tokenizer, folder) == special_tokens(tokenizer, folder) == ["<unk>", "<s>", "</s>"]
    assert parsed.count(own) == 1


def test_an_empty_end_token_is_none(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "PreTrainedTokenizerFast")
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"eos_token": ""}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="has no EOS token"):
        load_tokenizer(folder)


def said(content: str, **flags: bool) -> dict[str, Any]:
    """An added token, as settings have it."""
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"content": content, **dict.fromkeys(names, False), **flags}


@pytest.mark.parametrize(
    ("settings", "why", "fix"),
    [
        ({"split_special_tokens": True}, "text of a special token becomes several ids", "to false"),
        ({"eos_token": "e"}, "make 'e' a token of its own (eos_token)", "one of '<unk>', '<s>', '</s>'"),
        ({"additional_special_tokens": ["the "]}, "make 'the ' a token of its own,", "take 'the ' out of"),
        ({"image_token": "<call>"}, "make '<call>' a token of its own (image_token)", "take '<call>' out of"),
        ({"pad_token": "zebra"}, "make 'zebra' a token of its own (pad_token)", "one of '<unk>'"),
        ({"added_tokens_decoder": {"300": said("<call>")}}, "make '<call>' a token", "take '<call>' out of"),
        (
            {"added_tokens_decoder": {"2": said("</s>", special=True, single_word=True)}},
            "say otherwise than that file where '</s>' is a token: that file has single_word false",
            "set single_word false for '</s>'",
        ),
        (
            {"added_tokens_decoder": {"2": said("</s>", special=True, lstrip=True, rstrip=True)}},
            "that file has lstrip false, rstrip false",
            "set lstrip false, rstrip false for '</s>'",
        ),
    ],
)
def test_settings_that_give_other_ids_than_the_file_are_named(
    tmp_path: Path, settings: dict[str, Any], why: str, fix: str
) -> None:
    folder = write_folder(tmp_path, "PreTrainedTokenizerFast")
    path = folder / "tokenizer_config.json"
    own = path.read_text()
    path.write_text(json.dumps(json.loads(own) | settings))
    with pytest.raises(ConfigError, match="transformers loads another tokenizer") as refused:
        load_tokenizer(folder)
    assert why in str(refused.value.why)
    assert fix in str(refused.value.fix)
    path.write_text(own)
    load_tokenizer(folder)


@pytest.mark.parametrize("file", ["added_tokens.json", "special_tokens_map.json"])
def test_tokens_that_another_file_adds_are_refused(tmp_path: Path, file: str) -> None:
    folder = write_folder(tmp_path, "PreTrainedTokenizerFast")
    adds = {"<call>": 300} if file == "added_tokens.json" else {"additional_special_tokens": ["<call>"]}
    (folder / file).write_text(json.dumps(adds))
    with pytest.raises(ConfigError, match="of 'a <call> b' it gives") as refused:
        load_tokenizer(folder)
    assert "take '<call>' out of the added and special tokens" in str(refused.value.fix)


NORMALIZERS = {
    "accents put together": normalizers.NFC(),
    "forms replaced": normalizers.NFKC(),
    "capitals": normalizers.Lowercase(),
    "accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.NFC()]),
    "control characters": normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=False, strip_accents=False, lowercase=False
    ),
}


@pytest.mark.parametrize("kind", NORMALIZERS)
def test_a_normalizer_that_tokenizer_json_does_not_have_is_noticed(tmp_path: Path, kind: str) -> None:
    folder = write_folder(tmp_path, "PreTrainedTokenizerFast")
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    _refuse_other_ids(loaded, folder)
    loaded.backend_tokenizer.normalizer = NORMALIZERS[kind]
    with pytest.raises(ConfigError, match="transformers loads another tokenizer"):
        _refuse_other_ids(loaded, folder)


def test_a_flag_that_changes_no_id_is_no_other_tokenizer(tmp_path: Path) -> None:
    """As of many folders, whose settings say that a token is normalized, and nothing normalizes."""
    folder = write_folder(tmp_path, "PreTrainedTokenizerFast")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    other = {"added_tokens_decoder": {"2": said("</s>", normalized=True)}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **other}))
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder)("a</s> b")["input_ids"] == own.encode("a</s> b").ids


@pytest.mark.parametrize("declared", ["PreTrainedTokenizerFast", "GPT2Tokenizer"])
def test_what_the_refusal_advises_gives_the_ids_of_the_file(tmp_path: Path, declared: str) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path, declared))
    text = "Is it\n\n in Europe? é 中 123"
    own = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer(text)["input_ids"] == own.encode(text).ids


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_the_advice_leads_on_whoever_chooses_the_class(tmp_path: Path, model_type: str) -> None:
    """For some types of models transformers takes its own class, whatever the settings declare."""
    folder = write_folder(tmp_path, "LlamaTokenizerFast", words="1234567 1234567 Where is the town?")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ConfigError) as refused:
        load_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    declared = {**settings, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(declared))
    if "PreTrainedTokenizerFast" not in str(refused.value.fix):
        with pytest.raises(ConfigError):
            load_tokenizer(folder)
        assert "AutoTokenizer.from_pretrained(COPY).save_pretrained(COPY)" in str(refused.value.fix)
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    assert ("the model's type" in str(refused.value.fix)) == (model_type == "qwen2")
    load_tokenizer(folder)


def test_a_token_that_the_settings_add_to_the_file_is_no_other_tokenizer(tmp_path: Path) -> None:
    """As many folders name a padding token that tokenizer.json does not have."""
    folder = write_folder(tmp_path, "PreTrainedTokenizerFast")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "[PAD]"}))
    tokenizer = load_tokenizer(folder)
    assert special_tokens(tokenizer, folder) == ["<unk>", "<s>", "</s>", "[PAD]"]


# What a class of transformers makes of a vocabulary is its own tokenizer: these are honest folders of each.
OWN = {
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "CodeLlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "GemmaTokenizer": {
        "unk_token": "<unk>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
    },
}
TEXTS = ("Where is the town?", "  two\n\nlines é 中 ", "", "a <unk> b")


def write_own_folder(folder: Path, kind: str) -> Path:
    tokens = OWN[kind]
    letters = sorted({letter for text in TEXTS for letter in text if letter.isalpha() and letter.isascii()})
    vocabulary = [*tokens.values(), *(f"<0x{i:02X}>" for i in range(256)), "▁", "?", *letters, "th", "the"]
    made = getattr(transformers, kind)(
        vocab={token: i for i, token in enumerate(dict.fromkeys(vocabulary))},
        merges=[("t", "h"), ("th", "e")],
        **tokens,
    )
    made.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def outcome(folder: Path) -> tuple[ConfigError | None, Any]:
    try:
        return None, load_tokenizer(folder)
    except ConfigError as refusal:
        return refusal, None


@pytest.mark.parametrize("kind", OWN)
def test_the_ids_are_those_of_tokenizer_json_or_refused_whatever_the_settings_say_of_bos_and_eos(
    tmp_path: Path, kind: str
) -> None:
    folder = write_own_folder(tmp_path, kind)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    file = json.loads((folder / "tokenizer.json").read_text())
    bos, eos = OWN[kind]["bos_token"], OWN[kind]["eos_token"]
    outcomes = set()
    for single in (None, "$A", f"{bos} $A", f"{bos} $A {eos}"):
        backend = Tokenizer.from_str(json.dumps({**file, "post_processor": None}))
        if single is not None:
            special = [(token, backend.token_to_id(token)) for token in (bos, eos)]
            backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
        backend.save(str(folder / "tokenizer.json"))
        for adds in ({}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": True}):
            (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **adds}))
            refusal, tokenizer = outcome(folder)
            outcomes.add(refusal is None)
            if tokenizer is None:
                assert f"declares {settings['tokenizer_class']}" in str(refusal)
                assert ", tokenizer.json [" in str(refusal)
            else:
                own = Tokenizer.from_file(str(folder / "tokenizer.json"))
                assert all(tokenizer(text)["input_ids"] == own.encode(text).ids for text in TEXTS)
    assert True in outcomes
