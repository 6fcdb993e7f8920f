"""Paths and URLs: what a name means, and what a store's answers mean."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fsspec.implementations.memory import MemoryFileSystem
from upath import UPath

from dpo_opt.cli import main
from dpo_opt.schemas.errors import ConfigError, DataError, DpoOptError
from dpo_opt.schemas.locations import (
    AnyPath,
    inside,
    is_file,
    location,
    on_this_machine,
    put_file,
    read_all,
    remove,
    sizes,
)
from dpo_opt.schemas.manifest import load_manifest
from dpo_opt.schemas.shard_folder import check_file
from dpo_opt.schemas.storage import publish, sha256_file, write_text


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UPath]:
    """A folder in a store of this process, with a cache of this test's own."""
    monkeypatch.setenv("DPO_OPT_CACHE", str(tmp_path / "cache"))
    path = location("memory://bucket/a b[0]*?/ü%20#x")
    assert isinstance(path, UPath)
    yield path
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("shards", "shards"),
        ("~/shards", "HOME/shards"),
        (Path("~/shards"), "HOME/shards"),
        ("~nobody/shards", "~nobody/shards"),
        ("a~/shards", "a~/shards"),
        ("file:///data/my shards", "/data/my shards"),
        ("local:///data", "/data"),
        ("odd:name/x", "odd:name/x"),
    ],
)
def test_names_of_this_machine_are_paths(
    name: str | Path, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = location(name)
    assert isinstance(found, Path)
    assert str(found) == expected.replace("HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (Path("s3://bucket/shards"), "two slashes"),
        ("s3:/bucket/shards", "two slashes"),
        ("memory://", "names no bucket or folder"),
        ("memory:///", "names no bucket or folder"),
        ("nonsense://a/b", "not a URL that can be used"),
    ],
)
def test_what_is_no_usable_url_is_refused(name: str | Path, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        location(name)
    assert caught.value.where == str(name)


def test_a_path_that_is_not_utf8_is_refused_as_a_shell_writes_it(tmp_path: Path) -> None:
    name = os.fsdecode(b"/tmp/caf\xe9")
    with pytest.raises(ConfigError, match="not UTF-8") as caught:
        location(name)
    assert caught.value.where == r"$'/tmp/caf\xe9'"
    assert (caught.value.why is None, caught.value.fix is None) == (False, False)
    ran = CliRunner().invoke(main, ["status", "--shards", str(tmp_path / os.fsdecode(b"\xff"))])
    assert ran.exit_code == 2
    assert "the name is not UTF-8" in ran.stderr


def test_a_password_in_a_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="password") as caught:
        location("sftp://me:hunter2@host/shards")
    assert "hunter2" not in str(caught.value)


def test_a_package_that_is_missing_is_named_before_anything_is_done() -> None:
    code = """
import sys
sys.modules["s3fs"] = None
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.locations import location
try:
    location("s3://bucket/shards")
except ConfigError as error:
    print(error.fix)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("pip install 'dpo-opt[s3]'\n", 0), done.stderr


def test_a_url_means_the_same_with_and_without_its_last_slash() -> None:
    assert location("memory://bucket/shards/") == location("memory://bucket/shards")


def test_a_folder_of_any_name_is_listed_and_read(store: UPath) -> None:
    assert sizes(store) == {}
    for name in ("00001-a.json", "00001-b.json", "00002-a.json"):
        write_text(store / name, name)
    write_text(store / "inside" / "00001-c.json", "c")
    assert sizes(store) == dict.fromkeys(("00001-a.json", "00001-b.json", "00002-a.json"), 12)
    assert set(sizes(store, prefix="00001-")) == {"00001-a.json", "00001-b.json"}
    # One that was removed meanwhile is left out.
    found = read_all(store, ["00002-a.json", "gone.json", "00001-a.json"])
    assert found == {"00002-a.json": b"00002-a.json", "00001-a.json": b"00001-a.json"}
    assert is_file(store / "00001-a.json")
    assert not is_file(store / "inside")
    assert not is_file(store / "gone.json")
    with on_this_machine(store) as here:
        assert {p.relative_to(here).as_posix() for p in here.rglob("*.json")} == {
            "00001-a.json",
            "00001-b.json",
            "00002-a.json",
            "inside/00001-c.json",
        }
    with pytest.raises(FileNotFoundError), on_this_machine(store / "gone.json"):
        pass


def test_a_path_lists_and_reads_alike(tmp_path: Path) -> None:
    (tmp_path / "00001-a.json").write_text("a")
    (tmp_path / "00002-a.json").write_text("b")
    assert sizes(tmp_path, prefix="00002-") == {"00002-a.json": 1}
    assert read_all(tmp_path, ["gone.json", "00001-a.json"]) == {"00001-a.json": b"a"}
    assert read_all(tmp_path / "00001-a.json", ["inside"]) == {}


@pytest.mark.parametrize("place", ["disk", "store", "store without conditional requests"])
def test_of_several_that_come_at_once_one_stays(
    store: UPath, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path: AnyPath = tmp_path / "plan.json" if place == "disk" else store / "plan.json"
    if place == "store without conditional requests":
        put = MemoryFileSystem.put_file

        def refuse(self: Any, *args: Any, mode: str = "overwrite", **others: Any) -> None:
            if mode == "create":
                raise OSError(errno.ENOSYS, "a header that is not implemented")
            put(self, *args, **others)

        monkeypatch.setattr(MemoryFileSystem, "put_file", refuse)
    write_text(path, "first", replace=False)
    with pytest.raises(FileExistsError):
        write_text(path, "second", replace=False)
    assert path.read_text() == "first"
    write_text(path, "third")
    assert path.read_text() == "third"
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]


def test_a_store_that_does_not_answer_has_not_said_no(store: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    for name in ("info", "cat_file", "get_file", "put_file", "ls", "find"):
        monkeypatch.setattr(MemoryFileSystem, name, refuse)
    calls = [
        lambda: is_file(store / "manifest.json"),
        lambda: sizes(store),
        lambda: sizes(store, prefix="00001-"),
        lambda: load_manifest(store),
        lambda: sha256_file(store / "a"),
        lambda: check_file(store, "data/a.parquet", "0" * 64),
        lambda: write_text(store / "a", "text"),
        lambda: write_text(store / "a", "text", replace=False),
    ]
    for call in calls:
        with pytest.raises(
            DpoOptError, match=r"the store refuses or does not answer \(Access Denied\)"
        ) as caught:
            call()
        assert caught.value.exit_code == 1


def test_a_full_disk_is_not_the_stores_fault(store: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_text(store / "a", "text")
    monkeypatch.setattr(MemoryFileSystem, "get_file", full)
    with pytest.raises(DpoOptError, match="the disk is full"):
        sha256_file(store / "a")


def put(store: UPath, content: bytes, tmp_path: Path) -> str:
    """Put a file as data/a.parquet; returns its hash."""
    file = tmp_path / "a.parquet"
    file.write_bytes(content)
    put_file(file, store / "data" / "a.parquet")
    return sha256_file(file)


def test_what_is_damaged_in_the_cache_is_fetched_again_and_a_changed_object_never_kept(
    store: UPath, tmp_path: Path
) -> None:
    sha256 = put(store, b"pairs", tmp_path)
    kept = check_file(store, "data/a.parquet", sha256)
    kept.write_bytes(b"pairx")
    assert check_file(store, "data/a.parquet", sha256).read_bytes() == b"pairs"
    put(store, b"other", tmp_path)
    kept.unlink()
    with pytest.raises(DataError, match="the bytes changed") as caught:
        check_file(store, "data/a.parquet", sha256)
    assert caught.value.where == str(store / "data" / "a.parquet")
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []
    remove(store / "data" / "a.parquet")
    remove(store / "data" / "a.parquet")
    with pytest.raises(DataError, match="the file is missing"):
        check_file(store, "data/a.parquet", sha256)


def test_a_cache_that_cannot_be_written_is_explained(
    store: UPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = put(store, b"pairs", tmp_path)
    monkeypatch.setenv("DPO_OPT_CACHE", str(tmp_path / "a.parquet"))
    with pytest.raises(DpoOptError, match="the cache cannot be written") as caught:
        check_file(store, "data/a.parquet", sha256)
    assert "DPO_OPT_CACHE" in str(caught.value.fix)


def test_an_empty_cache_setting_is_none(
    store: UPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = put(store, b"pairs", tmp_path)
    monkeypatch.setenv("DPO_OPT_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert check_file(store, "data/a.parquet", sha256).is_relative_to(tmp_path / "xdg" / "dpo-opt")


def test_an_error_while_writing_puts_nothing(store: UPath) -> None:
    def write_half() -> None:
        with publish(store / "half") as private:
            private.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert sizes(store) == {}


LEAVING = ["", "..", ".", "../a", "a/../../b", "/etc/passwd", "a//b", "a/", "a\\..\\b", "C:/a", "C:a", "a\0b"]


@pytest.mark.parametrize("name", LEAVING)
def test_a_name_that_leaves_its_folder_is_refused_on_a_disk_and_in_a_store(
    store: UPath, tmp_path: Path, name: str
) -> None:
    for folder in (tmp_path, store):
        for use in (lambda f: inside(f, name), lambda f: read_all(f, [name])):
            with pytest.raises(DataError, match="does not stay inside") as caught:
                use(folder)
            assert caught.value.where == str(folder)
            assert repr(name) in caught.value.what


def test_names_that_only_look_odd_are_names(store: UPath, tmp_path: Path) -> None:
    for name in ("a..b", "...", ".hidden/x", "ü b", "chat_templates/tool use.jinja"):
        assert inside(tmp_path, name) == tmp_path / name
        assert inside(store, name) == store / name


def test_odd_keys_of_a_store_are_in_no_list(store: UPath) -> None:
    write_text(store / "00001-a.json", "a")
    for name in ("..", "a\\b", "c:d"):
        MemoryFileSystem.store[f"{store.path}/{name}"] = MemoryFileSystem.store[f"{store.path}/00001-a.json"]
    assert set(sizes(store)) == {"00001-a.json"}
    assert set(sizes(store, prefix="0")) == {"00001-a.json"}


def test_of_a_folder_in_a_store_only_what_is_named_is_fetched(store: UPath) -> None:
    for name in ("a", "sub/b", "c"):
        write_text(store / name, name)
    with on_this_machine(store, names=["a", "sub/b", "gone"]) as here:
        assert {p.relative_to(here).as_posix() for p in here.rglob("*") if p.is_file()} == {"a", "sub/b"}
    with pytest.raises(DataError, match="does not stay inside"), on_this_machine(store, names=["a", "../b"]):
        pass
