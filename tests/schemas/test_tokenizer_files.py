"""A tokenizer's files are copied byte for byte, and nothing else is."""

import os
from pathlib import Path

import pytest

from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.tokenizer_files import copy_tokenizer, tokenizer_files

OWN = [
    "added_tokens.json",
    "additional_chat_templates/rag.jinja",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.4.0.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer_config.json",
    "vocab.json",
]
OTHERS = [
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.py",
    "more/tokenizer.json",
]


def written(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        # Line ends of other systems and half characters are bytes like any others.
        (folder / name).write_bytes(f"{name}\r\n".encode() + b"\xff")
    return folder


def test_every_file_of_a_tokenizer_is_copied_as_it_is_and_no_other(tmp_path: Path) -> None:
    source = written(tmp_path / "model", OWN + OTHERS)
    assert tokenizer_files(source) == OWN
    copy_tokenizer(source, tmp_path / "copy")
    copied = {p.relative_to(tmp_path / "copy").as_posix(): p for p in (tmp_path / "copy").rglob("*.*")}
    assert sorted(copied) == OWN
    assert all(path.read_bytes() == (source / name).read_bytes() for name, path in copied.items())


def test_links_are_followed_as_in_the_hubs_cache_and_what_is_no_file_is_left_out(tmp_path: Path) -> None:
    blobs = written(tmp_path / "blobs", ["0badc0de"])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").symlink_to(blobs / "0badc0de")
    (tmp_path / "model" / "vocab.txt").symlink_to(blobs / "gone")
    (tmp_path / "model" / "spiece.model").mkdir()
    os.mkfifo(tmp_path / "model" / "merges.txt")
    copy_tokenizer(tmp_path / "model", tmp_path / "copy")
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["tokenizer.json"]
    assert not (tmp_path / "copy" / "tokenizer.json").is_symlink()


@pytest.mark.parametrize("name", ["a:b.jinja", "a\\b.jinja", os.fsdecode(b"\xff.jinja")])
def test_a_name_that_no_folder_of_shards_can_hold_is_refused(tmp_path: Path, name: str) -> None:
    source = written(tmp_path, ["tokenizer.json"])
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / name).write_text("{{ messages }}")
    with pytest.raises(ConfigError) as refused:
        copy_tokenizer(source, tmp_path / "copy")
    assert refused.value.where == str(source / "additional_chat_templates")
    assert not (tmp_path / "copy").exists()


def test_the_copy_of_a_read_only_folder_can_be_written(tmp_path: Path) -> None:
    source = written(tmp_path / "source", ["tokenizer.json", "additional_chat_templates/a.jinja"])
    places = [source, *source.rglob("*")]
    for path in places:
        path.chmod(path.stat().st_mode & ~0o222)
    copy_tokenizer(source, tmp_path / "copy")
    copied = [tmp_path / "copy", *(tmp_path / "copy").rglob("*")]
    assert len(copied) == len(places)
    assert all(path.stat().st_mode & 0o200 for path in copied)
    for path in places:
        path.chmod(0o755)
