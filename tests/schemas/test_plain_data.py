"""What others wrote as JSON or YAML ends in words, however deep it is nested."""

import json
import shutil
import struct
from pathlib import Path

import pytest
from click.testing import CliRunner
from fakes import FINGERPRINT

from dpo_opt.analysis.run_files import open_run
from dpo_opt.cli import main
from dpo_opt.optimize.adapters.adapter_folder import read_adapter
from dpo_opt.precompute.engine.option_rules import read_engine_options
from dpo_opt.precompute.shards.recover_plan import latest_settings
from dpo_opt.precompute.shards.scored_tokenizer import files_state_tokenizer
from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer
from dpo_opt.schemas.errors import ConfigError, DataError
from dpo_opt.schemas.fingerprint import follows
from dpo_opt.schemas.manifest import COMMAND, MANIFEST, TOKENIZER, load_manifest
from dpo_opt.schemas.models import read_config
from dpo_opt.schemas.plain_data import MOST_LEVELS, json_of, levels, yaml_of
from dpo_opt.schemas.weights import loaded_files, weights_digest

# Refused by the count of levels; by Python's own limit; and at any depth of the caller.
DEPTHS = [150, 700, 20_000]


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def test_what_is_not_deep_is_read() -> None:
    for read in (json_of, yaml_of):
        assert read(nested(MOST_LEVELS)) == json.loads(nested(MOST_LEVELS))
        assert read(b'{"a": [1, "\xc3\xa4", null]}') == {"a": [1, "ä", None]}
        assert levels(read("[[], [[1]], {}]")) == 3
    assert json_of("[" + ",".join(["[]"] * 500) + "]") == [[]] * 500
    assert yaml_of("") is None


def test_an_alias_counts_once_and_may_name_what_it_stands_in() -> None:
    value = yaml_of("\n".join(["- &a0 [x]", *(f"- &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]))
    assert levels(value) <= MOST_LEVELS
    assert levels(yaml_of("&a [*a]")) == 1


@pytest.mark.parametrize("depth", DEPTHS)
def test_what_is_nested_deeply_is_a_value_error(depth: int) -> None:
    for read in (json_of, yaml_of):
        for text in (nested(depth), nested(depth).encode(), '{"a":' * depth):
            with pytest.raises(ValueError, match=r"."):
                read(text)
    with pytest.raises(ValueError, match="nested too deeply, more than 100 levels"):
        json_of(nested(depth))


@pytest.mark.parametrize(
    "text", ["2001-13-01", "!!int x", "!!binary ä", "a: [", "!!python/name:os.system", b"\xff"]
)
def test_yaml_that_cannot_be_read_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        yaml_of(text)


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_file_that_others_wrote_is_refused_in_words(
    tmp_path: Path, tiny_model: Path, depth: int
) -> None:
    deep = f'{{"a": {nested(depth)}}}'
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "config.json").write_text(deep)
    with pytest.raises(ConfigError, match="not readable as JSON"):
        read_config(model)
    shutil.copy(tiny_model / "config.json", model)
    (model / "tokenizer_config.json").write_text(deep)
    with pytest.raises(ConfigError, match="the tokenizer cannot be loaded"):
        load_tokenizer(model)
    (model / "model.safetensors").rename(model / "part.safetensors")
    (model / "model.safetensors.index.json").write_text(deep)
    with pytest.raises(ConfigError, match="not readable as an index of weights"):
        loaded_files(model)
    (model / "model.safetensors.index.json").unlink()
    header = deep.encode()
    (model / "part.safetensors").unlink()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ConfigError, match="truncated or damaged"):
        weights_digest(model)
    with pytest.raises(ConfigError, match="neither JSON nor a YAML scalar"):
        read_engine_options([f"hf_overrides={nested(depth)}"])
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(deep)
    (adapter / "adapter_model.safetensors").touch()
    with pytest.raises(DataError, match="not an adapter's configuration"):
        read_adapter(adapter)


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_record_of_a_folder_that_others_wrote_is_refused_in_words(tmp_path: Path, depth: int) -> None:
    deep = f'{{"a": {nested(depth)}, "sha256": "b"}}'
    (tmp_path / MANIFEST).write_text(deep)
    with pytest.raises(DataError, match="not readable as a manifest"):
        load_manifest(tmp_path)
    (tmp_path / COMMAND).write_text(deep)
    with pytest.raises(DataError, match=f"there is no {COMMAND} to make it again by"):
        latest_settings(tmp_path, lost="plan.json")
    (tmp_path / TOKENIZER).mkdir()
    (tmp_path / TOKENIZER / "tokenizer.json").write_text(deep)
    assert not files_state_tokenizer(tmp_path, FINGERPRINT)
    other = FINGERPRINT.model_copy(update={"engine_options": nested(depth)})
    assert not follows(other, FINGERPRINT)
    settings = tmp_path / "settings.yaml"
    settings.write_text(deep)
    for command in ("precompute", "train"):
        said = CliRunner().invoke(main, [command, "--config", str(settings)])
        assert (said.exit_code, type(said.exception)) == (2, SystemExit)
        assert "not readable as YAML (it is nested too deeply" in said.output
    (tmp_path / "config.resolved.yaml").write_text(deep)
    with pytest.raises(DataError, match="not readable as YAML"):
        open_run(tmp_path)
