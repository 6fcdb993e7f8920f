import errno
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer
from dpo_opt.schemas.errors import DpoOptError
from dpo_opt.schemas.locations import location
from dpo_opt.schemas.shards import write_table
from dpo_opt.schemas.storage import publish, settle_folder, sha256_file, sha256_folder, write_text


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write_half(path: Path, error: BaseException) -> None:
    with publish(path) as private:
        private.write_text("half")
        assert names(path.parent) >= {private.name}
        raise error


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_published_file_has_its_content_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "note.txt"
    write_text(path, "first\n")
    write_text(path, "Größe\n")
    assert path.read_bytes() == b"Gr\xc3\xb6\xc3\x9fe\n"
    assert names(path.parent) == {"note.txt"}


def test_a_file_that_another_process_removed_before_it_has_its_name_is_said_so(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("old")

    def write() -> None:
        with publish(path) as private:
            private.write_text("new")
            private.unlink()

    with pytest.raises(DpoOptError, match="removed while it was being written") as caught:
        write()
    assert (caught.value.where, path.read_text()) == (str(path), "old")


def test_a_folder_that_loses_a_file_while_it_is_read_is_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    whole = sha256_folder(tmp_path)

    def lose(path: Path) -> str:
        if path.name == "a":
            (tmp_path / "b").unlink()
        return sha256_file(path)

    monkeypatch.setattr("dpo_opt.schemas.storage.sha256_file", lose)
    assert sha256_folder(tmp_path) != whole


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("old")
    with publish(path) as private:
        private.write_text("ne")
        assert path.read_text() == "old"
        assert private.parent == path.parent
        assert private.name.startswith(".")
        private.write_text("new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt(), OSError(errno.EIO, "broken")])
def test_an_error_while_writing_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    kept = tmp_path / "kept.txt"
    kept.write_text("old")
    for path in (kept, tmp_path / "new.txt"):
        with pytest.raises(type(error)):
            write_half(path, error)
    assert names(tmp_path) == {"kept.txt"}
    assert kept.read_text() == "old"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_by_name(tmp_path: Path, code: int) -> None:
    with pytest.raises(DpoOptError, match="the disk is full") as caught:
        write_half(tmp_path / "a", OSError(code, os.strerror(code)))
    assert caught.value.where == str(tmp_path)
    assert caught.value.fix
    assert names(tmp_path) == set()


def test_a_really_full_disk_leaves_nothing(small_disk: Path) -> None:
    noise = pa.table({"noise": np.random.default_rng(0).random(100_000)})
    with pytest.raises(DpoOptError, match="the disk is full"):
        write_table(small_disk / "data" / "big.parquet", noise)
    assert names(small_disk / "data") == set()
    # The place is free again, and a table that fits is written.
    write_table(small_disk / "data" / "small.parquet", noise.slice(0, 1000))
    assert pq.read_table(small_disk / "data" / "small.parquet").num_rows == 1000


@pytest.mark.parametrize(
    "error", [Exception("No space left on device (os error 28)"), OSError(errno.ENOSPC, "No space left")]
)
def test_a_full_temporary_folder_is_said_by_name_whichever_library_meets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The tokenizers library raises a bare Exception, in Rust's words."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))

    def fill(_: Path) -> None:
        raise error

    store = location("memory://bucket/t")
    with (
        pytest.raises(DpoOptError, match="the disk is full") as caught,
        settle_folder(store, last="a") as own,
    ):
        fill(own)
    assert caught.value.where == str(tmp_path / "tmp")
    assert caught.value.fix
    assert names(tmp_path) == {"tmp"}
    assert names(tmp_path / "tmp") == set()


def test_a_tokenizer_that_does_not_fit_the_temporary_folder_is_explained(
    small_disk: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(tiny_model)
    (small_disk / "other").write_bytes(b"x" * 255_000)
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    for path in (small_disk / "t", location("memory://bucket/t")):
        with pytest.raises(DpoOptError, match="the disk is full"), settle_folder(path, last="a") as own:
            tokenizer.save_pretrained(own)
        assert names(small_disk) == {"other"}


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), Exception("broken (os error 5)")])
def test_a_failure_without_a_file_name_gets_the_folders(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(OSError, match=r"broken|Input/output") as caught:
        write_half(tmp_path / "a", error)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(tmp_path))


def test_a_file_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "note.txt"
    synced: list[tuple[str, bool]] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, path.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(path, "text")
    (private, named_before), (folder, named_after) = synced
    assert private.startswith(".note.txt.")
    assert not named_before
    assert folder == tmp_path.name
    assert named_after


def test_sha256_file_is_what_sha256sum_prints(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc") == hashlib.sha256(b"abc").hexdigest()


def test_a_folders_hash_covers_names_bytes_and_subfolders(tmp_path: Path) -> None:
    def make(folder: str, files: dict[str, str]) -> str:
        for name, text in files.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return sha256_folder(tmp_path / folder)

    same = make("a", {"x": "1", "y": "2"})
    assert same == make("b", {"y": "2", "x": "1"})
    lines = "".join(f"{hashlib.sha256(t.encode()).hexdigest()}  {n}\n" for n, t in (("x", "1"), ("y", "2")))
    assert same == hashlib.sha256(lines.encode()).hexdigest()
    others = [
        make("c", {"x": "2", "y": "1"}),
        make("d", {"x": "1", "z": "2"}),
        make("e", {"x": "1"}),
        # A tokenizer with several chat templates keeps them in a subfolder.
        make("f", {"x": "1", "y": "2", "templates/t.jinja": "3"}),
        make("g", {"x": "1", "y": "2", "templates/t.jinja": "4"}),
    ]
    assert len({same, *others}) == 6


def test_a_file_that_must_stay_stays_and_a_link_to_nothing_is_none(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "first")
    (tmp_path / "b").symlink_to("a")
    for name in ("a", "b"):
        with pytest.raises(FileExistsError):
            write_text(tmp_path / name, "second", replace=False)
    (tmp_path / "c").symlink_to("nowhere")
    write_text(tmp_path / "c", "third", replace=False)
    assert (tmp_path / "c").read_text() == "third"
    assert names(tmp_path) == {"a", "b", "c"}
    assert (tmp_path / "a").read_text() == "first"
