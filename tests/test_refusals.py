"""Damage of a folder of shards, one row a damage: who refuses it, and that the message names the file.

Each damage is made in a finished folder; ``finalize`` also sees it in one that is not finished yet.
Whoever does not refuse a damage does not read what was damaged; the table says so.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bit_flips import flip
from click.testing import CliRunner
from fakes import ScriptedScorer, preference_rows, weight_file, write_jsonl

from dpo_opt.analysis import scan_shards
from dpo_opt.cli import main
from dpo_opt.optimize.stream import PairStream
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.run import precompute
from dpo_opt.precompute.shards.commits import committed
from dpo_opt.precompute.shards.finalize import finalize
from dpo_opt.precompute.shards.gc import find_garbage, remove_garbage
from dpo_opt.precompute.shards.read_plan import read_plan
from dpo_opt.precompute.shards.status import status
from dpo_opt.schemas.errors import DataError, DpoOptError
from dpo_opt.schemas.manifest import (
    COMMITS,
    INDEX,
    MANIFEST,
    TOKENIZER,
    ShardCommit,
    load_manifest,
    to_json,
    write_manifest,
)
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.shards import write_table
from dpo_opt.schemas.storage import sha256_file
from dpo_opt.verify import verify

ROWS = preference_rows(14)
ROWS[4]["rejected"] = ROWS[4]["chosen"]  # dropped
ROWS[2]["weight"] = 2.0


def make(folder: Path, model: Path, rows: list[dict[str, object]]) -> Path:
    folder.mkdir(exist_ok=True)
    data = write_jsonl(folder / "data.jsonl", rows)
    config = PrecomputeConfig(model=str(model), data=data, shards=folder / "shards", pairs_per_shard=5)
    precompute(config, scorer=ScriptedScorer())
    return folder / "shards"


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("refusals"), tiny_model, ROWS)


@pytest.fixture(scope="module")
def another_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model and settings, as many rows, other data."""
    other = [{**row, "prompt": f"Other {row['prompt']}"} for row in ROWS]
    return make(tmp_path_factory.mktemp("another"), tiny_model, other)


@pytest.fixture
def shards(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "shards"))


# Who reads ------------------------------------------------------------------------------------------------


def read_for_training(shards: Path) -> None:
    """As training does: the tokenizer, the index, the weights, every pair."""
    folder = ShardFolder.open(shards)
    with folder.tokenizer():
        pass
    stream = PairStream(folder, eval_split=0.0)
    order = stream.epoch(seed=0, epoch=0)
    for pairs in stream.batches(order, 4):
        stream.weights(pairs)


def read_for_analysis(shards: Path) -> None:
    scan_shards(shards).collect()


def read_to_verify(shards: Path) -> None:
    verdict = verify(shards, model=None, num_pairs=1, dtype="auto")
    if verdict.problems:
        raise DataError("\n".join(verdict.problems))


def finish_again(shards: Path) -> None:
    """A finished folder keeps its manifest; looked at are only names and sizes of its files."""
    finalize(shards)


def finish(shards: Path) -> None:
    """The folder as it was before it was finished, with the same damage."""
    (shards / MANIFEST).unlink(missing_ok=True)
    finalize(shards)


READERS: dict[str, Callable[[Path], None]] = {
    "train": read_for_training,
    "analysis": read_for_analysis,
    "verify": read_to_verify,
    "finalize again": finish_again,
    "finalize": finish,
}
READ_PAIRS = {"train", "analysis", "verify"}
EVERYBODY = {"train", "analysis", "verify", "finalize again"}


# What is damaged ------------------------------------------------------------------------------------------


class Damage(NamedTuple):
    """One row of the table."""

    name: str
    make: Callable[[Path], Path]
    """Damages a folder and returns the file that a refusal must name."""
    refused_by: set[str]


def shard_file(shards: Path, shard: int = 1) -> Path:
    return shards / load_manifest(shards).shards[shard].file


def footer_length(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[-8:-4], "little")


def in_a_data_page(shards: Path) -> Path:
    path = shard_file(shards)
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    return flip(path, column.data_page_offset + column.total_compressed_size - 2)


def in_a_page_header(shards: Path) -> Path:
    path = shard_file(shards)
    return flip(path, pq.ParquetFile(path).metadata.row_group(0).column(3).data_page_offset + 1)


def in_the_footer(shards: Path) -> Path:
    path = shard_file(shards)
    return flip(path, -8 - footer_length(path) // 2)


def in_the_footers_length(shards: Path) -> Path:
    return flip(shard_file(shards), -7)


def in_the_magic_bytes(shards: Path) -> Path:
    return flip(shard_file(shards), -1)


def cut(keep: float) -> Callable[[Path], Path]:
    def damage(shards: Path) -> Path:
        path = shard_file(shards)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep)])
        return path

    return damage


def one_byte_short(shards: Path) -> Path:
    path = shard_file(shards)
    path.write_bytes(path.read_bytes()[:-1])
    return path


def longer(shards: Path) -> Path:
    path = shard_file(shards)
    path.write_bytes(path.read_bytes() + b"\0")
    return path


def gone(shards: Path) -> Path:
    path = shard_file(shards)
    path.unlink()
    return path


def a_link_elsewhere(shards: Path) -> Path:
    """The same bytes, so that only where they stand is wrong."""
    path = shard_file(shards)
    path.symlink_to(shutil.move(path, shards.parent / "elsewhere.parquet"))
    return path


def a_folder_instead(shards: Path) -> Path:
    path = gone(shards)
    path.mkdir()
    return path


def another_shards(shards: Path) -> Path:
    """A whole shard in another's place."""
    path = shard_file(shards, 1)
    shutil.copyfile(shard_file(shards, 0), path)
    return path


def rewritten(shards: Path) -> Path:
    """A whole Parquet file with other values."""
    path = shard_file(shards)
    size = path.stat().st_size
    table = pq.read_table(path)
    values = [[-1.0] * len(row) for row in table["ref_chosen_token_logps"].to_pylist()]
    place = table.schema.get_field_index("ref_chosen_token_logps")
    write_table(path, table.set_column(place, table.field(place), pa.array(values, table.field(place).type)))
    assert path.stat().st_size != size, "then finalize would not notice again"
    return path


def edit_manifest(**changes: Any) -> Callable[[Path], Path]:
    """By hand: the hash at its end is the old one."""

    def damage(shards: Path) -> Path:
        path = shards / MANIFEST
        body = json.loads(path.read_text())
        for key, value in changes.items():
            inside = (
                body["shards"][1] if key in body["shards"][1] and key not in ("rows", "dropped") else body
            )
            assert inside[key] != value
            inside[key] = value
        path.write_text(json.dumps(body))
        return path

    return damage


def forge_manifest(**changes: Any) -> Callable[[Path], Path]:
    """By a program: the manifest's hash is right, what it says of shard 1 is not."""

    def damage(shards: Path) -> Path:
        manifest = load_manifest(shards)
        if "index_file" in changes:
            write_manifest(shards, manifest.model_copy(update=changes))
            return shards / MANIFEST
        entries = list(manifest.shards)
        entries[1] = entries[1].model_copy(update=changes)
        write_manifest(shards, manifest.model_copy(update={"shards": entries}))
        in_the_record = {"file", "dropped_file"} & set(changes) or "/" in str(changes.get("sha256"))
        return shards / MANIFEST if in_the_record else shards / entries[1].file

    return damage


def no_json(shards: Path) -> Path:
    path = shards / MANIFEST
    path.write_text(path.read_text()[:-50])
    return path


def index_of_another_order(shards: Path) -> Path:
    table = pq.read_table(shards / INDEX)
    write_table(shards / INDEX, table.take(list(reversed(range(len(table))))))
    return shards / INDEX


def index_flipped(shards: Path) -> Path:
    return flip(shards / INDEX, 300)


def index_gone(shards: Path) -> Path:
    (shards / INDEX).unlink()
    return shards / INDEX


def tokenizer_changed(shards: Path) -> Path:
    path = shards / TOKENIZER / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    return path


def tokenizer_file_added(shards: Path) -> Path:
    (shards / TOKENIZER / "added_tokens.json").write_text("{}")
    return shards / TOKENIZER


def tokenizer_gone(shards: Path) -> Path:
    shutil.rmtree(shards / TOKENIZER)
    return shards / TOKENIZER


def column(rows: list[Any], values: list[Any], name: str = "weight") -> Callable[[Path], Path]:
    def damage(shards: Path) -> Path:
        path = weight_file(shards)
        pq.write_table(pa.table({"row": rows, name: values}), path)
        return path

    return damage


def column_emptied(shards: Path) -> Path:
    path = weight_file(shards)
    path.write_bytes(b"")
    return path


def dropped_changed(shards: Path) -> Path:
    path = shards / load_manifest(shards).shards[0].dropped_file
    assert pq.read_table(path)["row"].to_pylist() == [4]
    return flip(path, 40)


def dropped_gone(shards: Path) -> Path:
    path = shards / load_manifest(shards).shards[0].dropped_file
    path.unlink()
    return path


HASHED = READ_PAIRS | {"finalize"}
RESIZED = HASHED | {"finalize again"}

TABLE = [
    Damage("a bit in a data page", in_a_data_page, HASHED),
    Damage("a bit in a page header", in_a_page_header, HASHED),
    Damage("a bit in the footer", in_the_footer, HASHED),
    Damage("a bit in the footer's length", in_the_footers_length, HASHED),
    Damage("a bit in the magic bytes", in_the_magic_bytes, HASHED),
    Damage("one byte short", one_byte_short, RESIZED),
    Damage("half of it", cut(0.5), RESIZED),
    Damage("empty", cut(0), RESIZED),
    Damage("one byte longer", longer, RESIZED),
    Damage("gone", gone, RESIZED),
    Damage("a link out of the folder", a_link_elsewhere, HASHED),
    Damage("a folder in its place", a_folder_instead, RESIZED),
    Damage("another shard's file", another_shards, RESIZED),
    Damage("other values, written anew", rewritten, RESIZED),
    Damage("manifest: a count", edit_manifest(kept=12), EVERYBODY),
    Damage("manifest: the rows", edit_manifest(rows=15), EVERYBODY),
    Damage("manifest: a hash", edit_manifest(sha256="0" * 64), EVERYBODY),
    Damage("manifest: a file", edit_manifest(file="data/00000-00000000.parquet"), EVERYBODY),
    Damage("manifest: a file outside", edit_manifest(file="../data.jsonl"), EVERYBODY),
    Damage("manifest: half of it", no_json, EVERYBODY),
    Damage("forged: a hash that is a path", forge_manifest(sha256="../../../elsewhere/x"), EVERYBODY),
    Damage("forged: a hash", forge_manifest(sha256="0" * 64), READ_PAIRS),
    Damage("forged: a file outside", forge_manifest(file="../data.jsonl"), EVERYBODY),
    Damage("forged: an absolute file", forge_manifest(file="/etc/passwd"), EVERYBODY),
    Damage("forged: dropped rows outside", forge_manifest(dropped_file="../data.jsonl"), EVERYBODY),
    Damage("forged: an index outside", forge_manifest(index_file="../data.jsonl"), EVERYBODY),
    Damage("forged: a count", forge_manifest(tokens=1), {"verify"}),
    # What analysis asks of a folder does not need the index, and finalize makes it.
    Damage("index of another order", index_of_another_order, {"train", "verify"}),
    Damage("index: a bit", index_flipped, {"train", "verify"}),
    Damage("index: gone", index_gone, {"train", "verify", "finalize again"}),
    # Training reads ids; finalize takes the hash of what is there.
    Damage("tokenizer: a file changed", tokenizer_changed, {"train", "verify"}),
    Damage("tokenizer: a file added", tokenizer_file_added, {"train", "verify"}),
    Damage("tokenizer: gone", tokenizer_gone, {"train", "verify", "finalize", "finalize again"}),
    # No hash names a column.
    Damage("column: rows of another folder", column([100, 101], [1.0, 2.0]), {"train", "verify"}),
    Damage("column: a row twice", column([2, 2], [1.0, 2.0]), {"train", "verify"}),
    Damage("column: another table", column([2], [1.0], name="score"), {"train", "verify"}),
    Damage("column: no numbers", column([2], ["heavy"]), {"train", "verify"}),
    Damage("column: empty", column_emptied, {"train", "verify"}),
    # Only finalize and verify ask why a row is missing.
    Damage("dropped rows: a bit", dropped_changed, {"verify", "finalize"}),
    Damage("dropped rows: gone", dropped_gone, {"verify", "finalize", "finalize again"}),
]


IN_WORDS = {"a bit in a data page", "half of it", "manifest: a count", "forged: a hash that is a path"}


def refusal(read: Callable[[Path], None], shards: Path) -> DpoOptError | None:
    try:
        read(shards)
    except DpoOptError as error:
        return error
    return None


@pytest.mark.parametrize("damage", TABLE, ids=lambda damage: damage.name)
def test_damage_is_refused_by_name(damage: Damage, shards: Path) -> None:
    file = damage.make(shards)
    found = {name: refusal(read, shards) for name, read in READERS.items()}
    assert {name for name, error in found.items() if error is not None} == damage.refused_by
    for name, error in found.items():
        if error is None:
            continue
        assert error.exit_code == 3, name
        if name == "finalize":
            # A shard without its file is not scored; the message says which shard.
            assert str(file) in str(error) or "not scored yet (1)" in str(error)
        else:
            assert str(file.parent if file.parent.name == TOKENIZER else file) in str(error), name
            assert file.name in str(error), name
    assert not (damage.refused_by >= {"finalize"} and (shards / MANIFEST).exists())


def test_the_folder_of_the_table_is_whole(shards: Path) -> None:
    for name, read in READERS.items():
        assert refusal(read, shards) is None, name


@pytest.mark.parametrize("damage", [d for d in TABLE if d.name in IN_WORDS], ids=lambda damage: damage.name)
def test_the_commands_refuse_in_words(damage: Damage, shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    file = damage.make(shards)
    for arguments in (
        ["verify"],
        ["train", "--model", str(tiny_model), "--output-dir", str(tmp_path / "run")],
        ["score", "--model", str(tiny_model), "--output", str(tmp_path / "scores.parquet")],
    ):
        result = CliRunner().invoke(main, [*arguments, "--shards", str(shards)])
        assert isinstance(result.exception, SystemExit), repr(result.exception)
        assert result.exit_code == 3
        assert "Traceback" not in result.output
        assert str(file) in result.output
    assert not (tmp_path / "scores.parquet").exists()


# What the system says -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code", ["ENAMETOOLONG", "ESTALE", "EIO", "ELOOP", "ENOSPC", "EDQUOT", "EACCES", "EROFS", "EMFILE"]
)
def test_what_the_system_refuses_is_said_with_place_reason_and_fix(
    code: str, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = getattr(errno, code)

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number), "/data/my shards")

    monkeypatch.setattr("dpo_opt.precompute.shards.status.status", fail)
    result = CliRunner().invoke(main, ["status", "--shards", str(shards)])
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1
    first, why, fix = result.stderr.splitlines()
    assert first == f"error: /data/my shards: {os.strerror(number)}"
    assert why.startswith("  why: ")
    assert fix.startswith("  fix: ")
    assert "{" not in fix


@pytest.mark.parametrize("code", ["EACCES", "EROFS"])
def test_a_command_that_changes_a_folder_that_cannot_be_written_says_what_lets_it(
    code: str, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is named, not the private file that was never made; another path would not be finalized."""
    (shards / MANIFEST).unlink()
    odd = shards.rename(shards.parent / "my {shards}")
    number = getattr(errno, code)

    def fail(folder: Path, *_: object) -> None:
        raise OSError(number, os.strerror(number), str(folder / ".index.parquet.0123abcd.tmp"))

    monkeypatch.setattr("dpo_opt.precompute.shards.finalize.write_index", fail)
    result = CliRunner().invoke(main, ["finalize", "--shards", str(odd)])
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    _, why, fix = result.stderr.splitlines()
    assert why == "  why: this command changes the folder; what only reads it needs no leave to write"
    said = f"chmod -R u+w '{odd}'" if code == "EACCES" else f"cp -rL '{odd}' COPY"
    assert fix.startswith(f"  fix: {said}")


@pytest.mark.parametrize(
    ("closed", "code", "fix"),
    [
        ("new/.scores.0123abcd.tmp", "EACCES", "chmod u+w {folder}, or pass a path that can be written"),
        ("new/.scores.0123abcd.tmp", "EROFS", "pass a path that can be written"),
        ("file", "EACCES", "chmod u+rX {folder}/file"),
        ("closed/file", "EACCES", "chmod u+rX {folder}/closed"),
    ],
)
def test_a_place_that_is_no_folder_of_shards_is_made_open_or_left(
    closed: str, code: str, fix: str, tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "closed").mkdir()
    number = getattr(errno, code)

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / closed))

    allowed = os.access

    def access(path: Path, mode: int) -> bool:
        """As for a user who may not read the two; root may everything."""
        return allowed(path, mode) and (mode == os.F_OK or path.name not in ("file", "closed"))

    monkeypatch.setattr("dpo_opt.precompute.shards.status.status", fail)
    monkeypatch.setattr("os.access", access)
    result = CliRunner().invoke(main, ["status", "--shards", str(shards)])
    assert result.stderr.splitlines()[-1] == f"  fix: {fix.format(folder=tmp_path)}"


def test_a_name_that_is_too_long_is_no_traceback(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["status", "--shards", str(tmp_path / ("x" * 300))])
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert "File name too long" in result.stderr
    assert "fix: pass a shorter path" in result.stderr


def test_links_that_never_end_are_no_traceback(shards: Path) -> None:
    (shards / MANIFEST).unlink()
    (shards / MANIFEST).symlink_to(MANIFEST)
    result = CliRunner().invoke(main, ["verify", "--shards", str(shards)])
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Too many levels of symbolic links" in result.stderr


def test_a_machine_without_room_for_temporary_files_is_told_so(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp', '/var/tmp']")

    monkeypatch.setattr("dpo_opt.precompute.shards.status.status", fail)
    result = CliRunner().invoke(main, ["status", "--shards", str(shards)])
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert "set TMPDIR" in result.stderr


# Commits of another run -----------------------------------------------------------------------------------


def unfinished(shards: Path) -> Path:
    (shards / MANIFEST).unlink()
    (shards / INDEX).unlink()
    return shards


def commit_files(shards: Path) -> list[Path]:
    return sorted((shards / COMMITS).iterdir())


def bring(source: Path, shards: Path, *, shard: int, attempt: str, **changes: Any) -> ShardCommit:
    """Copy a commit of another folder with its data, under an attempt id that readers would prefer."""
    theirs = ShardCommit.model_validate_json(commit_files(source)[shard].read_bytes())
    names = {
        "file": f"data/{shard:05d}-{attempt}.parquet",
        "dropped_file": f"dropped/{shard:05d}-{attempt}.parquet",
    }
    commit = theirs.model_copy(update={"attempt": attempt, **names, **changes})
    shutil.copyfile(source / theirs.file, shards / names["file"])
    shutil.copyfile(source / theirs.dropped_file, shards / names["dropped_file"])
    (shards / COMMITS / f"{shard:05d}-{attempt}.json").write_text(to_json(commit))
    return commit


def test_a_commit_of_another_run_is_never_used(shards: Path, another_run: Path) -> None:
    manifest = load_manifest(shards)
    foreign = bring(another_run, unfinished(shards), shard=1, attempt="00000000")
    assert foreign.attempt < manifest.shards[1].attempt
    assert finalize(shards) == manifest
    # Nor where it is the only one.
    unfinished(shards)
    (shards / COMMITS / f"00001-{manifest.shards[1].attempt}.json").unlink()
    assert status(shards).shards_committed == 2
    with pytest.raises(DataError, match="1 of 3 shards is not scored yet"):
        finalize(shards)
    assert not (shards / MANIFEST).exists()


def test_a_commit_of_another_run_changes_no_finished_folder(shards: Path, another_run: Path) -> None:
    manifest = load_manifest(shards)
    for shard in range(3):
        bring(another_run, shards, shard=shard, attempt="00000000")
    assert load_manifest(shards) == manifest
    read_for_training(shards)
    verdict = verify(shards, model=None, num_pairs=1, dtype="auto")
    assert verdict.problems == []
    assert "data/00001-00000000.parquet" in verdict.notes[0]
    assert "dropped/00001-00000000.parquet" in verdict.notes[0]
    # They may belong to a plan that somebody is about to put here, so only `gc` removes them.
    assert finalize(shards) == manifest
    assert "data/00001-00000000.parquet" in verify(shards, model=None, num_pairs=1, dtype="auto").notes[0]
    remove_garbage(find_garbage(shards, older_than_hours=0))
    assert verify(shards, model=None, num_pairs=1, dtype="auto").notes == []
    read_for_training(shards)


OUTSIDE = ["../another.parquet", "/tmp/another.parquet", "data/../../another.parquet", "another.parquet"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_commit_that_names_a_file_elsewhere_is_not_used(shards: Path, another_run: Path, name: str) -> None:
    manifest = load_manifest(shards)
    unfinished(shards)
    commit = ShardCommit.model_validate_json(commit_files(shards)[1].read_bytes())
    elsewhere = (shards / name) if name != OUTSIDE[1] else shards / commit.file
    if name != OUTSIDE[1]:
        shutil.copyfile(shards / commit.file, elsewhere)
    forged = commit.model_copy(update={"attempt": "00000000", "file": name})
    (shards / COMMITS / "00001-00000000.json").write_text(to_json(forged))
    assert committed(shards, read_plan(shards))[1] == commit
    assert finalize(shards) == manifest


def test_a_commit_whose_hash_is_not_its_files_stops_finalize(shards: Path) -> None:
    manifest = load_manifest(shards)
    unfinished(shards)
    path = commit_files(shards)[1]
    path.write_text(path.read_text().replace(manifest.shards[1].sha256, "0" * 64))
    with pytest.raises(DataError, match="the bytes changed") as caught:
        finalize(shards)
    assert str(shards / manifest.shards[1].file) in str(caught.value)


def test_every_named_file_is_in_the_table(made: Path) -> None:
    """A new kind of file in a finished folder needs a row above."""

    def kinds() -> Iterator[str]:
        for path in made.rglob("*"):
            if path.is_file():
                name = path.relative_to(made).as_posix()
                yield name if "/" not in name else name.split("/")[0] + "/"

    assert set(kinds()) == {
        "manifest.json",
        "index.parquet",
        "data/",
        "dropped/",
        "tokenizer/",
        "columns/",
        # Read by whoever goes on with the folder, not by readers.
        "plan.json",
        "precompute.yaml",
        "model_config.json",
        "weights.json",
        "commits/",
    }
    assert sha256_file(made / INDEX) == load_manifest(made).index_sha256
