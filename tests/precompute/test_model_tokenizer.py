"""Shards keep the files of the model's tokenizer as they are, and these make the same tokenizer there."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fakes import ScriptedScorer, preference_rows, write_jsonl

from dpo_opt.integrity import integrity_problems
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.run import precompute
from dpo_opt.precompute.shards.model_tokenizer import put_tokenizer
from dpo_opt.precompute.shards.repair import repair
from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer
from dpo_opt.precompute.tokens.templates import chat_templates
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.manifest import TOKENIZER, load_manifest
from dpo_opt.schemas.models import tokenizer_digest
from dpo_opt.schemas.storage import file_names

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def as_others_write_it(model: Path) -> Path:
    """The same tokenizer, in files that ``save_pretrained`` would not write so."""
    content = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(content, indent=7) + "\n\n")
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": template}, {"name": "../../rag", "template": TEMPLATE}]
    edit(model / "tokenizer_config.json", chat_template=named, tokenizer_class="PreTrainedTokenizerFast")
    (model / "special_tokens_map.json").write_text('{"eos_token":   "</s>"}')
    (model / "spiece.model").write_bytes(b"\x00\xff")
    return model


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in file_names(folder)}


def config_of(model: Path, tmp_path: Path) -> PrecomputeConfig:
    data = write_jsonl(tmp_path / "data.jsonl", preference_rows(6))
    values: dict[str, Any] = {"model": str(model), "data": data, "shards": tmp_path / "shards"}
    return PrecomputeConfig.model_validate(values)


def test_shards_hold_the_bytes_of_the_models_tokenizer(model: Path, tmp_path: Path) -> None:
    config = config_of(as_others_write_it(model), tmp_path)
    precompute(config, scorer=ScriptedScorer())
    kept = files(config.shards / TOKENIZER)
    names = ["special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json"]
    assert list(kept) == names
    assert kept == {name: (model / name).read_bytes() for name in names}
    loaded = [load_tokenizer(folder) for folder in (model, config.shards / TOKENIZER)]
    assert chat_templates(loaded[0]) == chat_templates(loaded[1])
    assert tokenizer_digest(loaded[1]) == load_manifest(config.shards).fingerprint.tokenizer
    assert integrity_problems(config.shards, load_manifest(config.shards)) == []


def test_a_lost_tokenizer_is_the_models_bytes_again(model: Path, tmp_path: Path) -> None:
    config = config_of(as_others_write_it(model), tmp_path)
    precompute(config, scorer=ScriptedScorer())
    before = files(config.shards)
    shutil.rmtree(config.shards / TOKENIZER)
    assert repair(config.shards).finalized
    assert files(config.shards) == before


def test_shards_of_a_tokenizer_that_was_saved_anew_are_the_models_too(model: Path, tmp_path: Path) -> None:
    """As older versions wrote them: what identifies a folder does not follow from how files are written."""
    config = config_of(as_others_write_it(model), tmp_path)
    precompute(config, scorer=ScriptedScorer())
    fingerprint = load_manifest(config.shards).fingerprint
    shutil.rmtree(config.shards)
    edit(model / "tokenizer_config.json", chat_template=TEMPLATE)  # save_pretrained refuses the other name
    tokenizer = load_tokenizer(model)
    shutil.copytree(model, tmp_path / "resaved")
    for name in ("special_tokens_map.json", "spiece.model"):
        (tmp_path / "resaved" / name).unlink()
    tokenizer.save_pretrained(tmp_path / "resaved")
    precompute(config.model_copy(update={"model": str(tmp_path / "resaved")}), scorer=ScriptedScorer())
    manifest = load_manifest(config.shards)
    assert manifest.fingerprint.model_copy(update={"chat_template": fingerprint.chat_template}) == fingerprint
    scorer = ScriptedScorer()
    assert precompute(config, scorer=scorer) == manifest
    assert not scorer.calls


def chosen_by_type(folder: Path) -> Path:
    """A tokenizer whose settings declare another class than the one that transformers takes for its model."""
    from transformers import Qwen2Tokenizer

    from dpo_opt.precompute.tokens.load_tokenizer import declared_class

    alphabet = json.loads((folder / "tokenizer.json").read_text())["model"]
    own = Qwen2Tokenizer(
        vocab=alphabet["vocab"],
        merges=[tuple(merge) for merge in alphabet["merges"]],
        unk_token="</s>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )
    own.save_pretrained(folder)
    edit(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    edit(folder / "config.json", model_type="qwen2")
    assert declared_class(folder) == "LlamaTokenizerFast"
    return folder


def test_the_models_configuration_goes_along_only_where_another_tokenizer_would_be_made_without(
    model: Path, tiny_model: Path, tmp_path: Path
) -> None:
    chosen_by_type(model)
    tokenizer = load_tokenizer(model)
    put_tokenizer(model, tokenizer, tmp_path / "kept")
    assert files(tmp_path / "kept") == {
        name: (model / name).read_bytes() for name in files(tmp_path / "kept")
    }
    assert tokenizer_digest(load_tokenizer(tmp_path / "kept")) == tokenizer_digest(tokenizer)
    (tmp_path / "kept" / "config.json").unlink()
    with pytest.raises(ConfigError, match="another tokenizer than"):
        load_tokenizer(tmp_path / "kept")
    put_tokenizer(tiny_model, load_tokenizer(tiny_model), tmp_path / "other")
    assert "config.json" not in files(tmp_path / "other")
