import hashlib
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fakes import FINGERPRINT
from pydantic import BaseModel
from refusals import bad_data

from dpo_opt.schemas.config_keys import MODEL_CONFIG, kept_model_config
from dpo_opt.schemas.manifest import (
    INDEX,
    MANIFEST,
    PLAN,
    TOKENIZER,
    Manifest,
    Plan,
    ShardCommit,
    ShardRange,
    load_manifest,
    parse,
    to_json,
    write_manifest,
)
from dpo_opt.schemas.pairs import ScoredPair
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.shards import INDEX_SCHEMA, write_dropped, write_shard, write_table
from dpo_opt.schemas.storage import sha256_file, sha256_folder

SHARDS, ROWS = 3, 140
FIRST_PLAN = Plan(
    fingerprint=FINGERPRINT,
    dataset_digest="d" * 64,
    rows=2,
    shards=[ShardRange(shard=0, start=0, stop=2, rows_digest="e" * 64)],
)


def pair(row: int) -> ScoredPair:
    return ScoredPair(
        row=row,
        source="ü",
        prompt_ids=np.array([row, 1], np.int32),
        chosen_ids=np.array([2, row], np.int32),
        rejected_ids=np.array([3], np.int32),
        ref_chosen_token_logps=np.array([-1, -row], np.float32),
        ref_rejected_token_logps=np.array([-0.5], np.float32),
    )


def make_folder(path: Path) -> Manifest:
    """A folder as FORMAT.md describes it, written without the precompute stage."""
    commits, index = [], []
    for shard in range(SHARDS):
        rows = range(shard * ROWS, (shard + 1) * ROWS)
        pairs = [pair(row) for row in rows]
        file, dropped = f"data/{shard:05d}-abc.parquet", f"dropped/{shard:05d}-abc.parquet"
        write_shard(path / file, pairs, fingerprint=FINGERPRINT, shard=shard)
        write_dropped(path / dropped, [])
        index += [
            {
                "row": p.row,
                "pair_id": p.pair_id,
                "prompt_id": p.prompt_id,
                "prompt_length": 2,
                "chosen_length": 2,
                "rejected_length": 1,
                "shard": shard,
                "row_group": i // 128,
            }
            for i, p in enumerate(pairs)
        ]
        commits.append(
            ShardCommit(
                shard=shard,
                start=rows.start,
                stop=rows.stop,
                attempt="abc",
                file=file,
                rows=ROWS,
                bytes=(path / file).stat().st_size,
                sha256=sha256_file(path / file),
                dropped_file=dropped,
                dropped_sha256=sha256_file(path / dropped),
                dropped={},
                rows_digest="d" * 64,
                truncated=0,
                tokens=7 * ROWS,
                unique_sequences=2 * ROWS,
                fingerprint=FINGERPRINT,
            )
        )
    write_table(path / INDEX, pa.Table.from_pylist(index, schema=INDEX_SCHEMA))
    (path / TOKENIZER).mkdir()
    (path / TOKENIZER / "tokenizer.json").write_text("{}")
    manifest = Manifest(
        fingerprint=FINGERPRINT,
        dataset_digest="d" * 64,
        rows=SHARDS * ROWS,
        kept=SHARDS * ROWS,
        dropped={},
        truncated=0,
        tokens=SHARDS * 7 * ROWS,
        shards=commits,
        index_file=INDEX,
        index_sha256=sha256_file(path / INDEX),
        tokenizer_sha256=sha256_folder(path / TOKENIZER),
        tokenizer_files=["tokenizer.json"],
    )
    write_manifest(path, manifest)
    return manifest


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "shards"
    make_folder(path)
    return path


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "shards"))


def read_all(path: Path) -> list[int]:
    return [p.row for p in ShardFolder.open(path).pairs()]


def test_a_whole_folder_is_read_in_row_order(folder: Path) -> None:
    opened = ShardFolder.open(folder)
    assert [p.row for p in opened.pairs()] == list(range(SHARDS * ROWS))
    index = opened.index().to_pylist()
    assert len(index) == SHARDS * ROWS
    # What the index says of a row is where that row is.
    for entry in index[::50]:
        (group,) = opened.row_groups(entry["shard"], row_groups=[entry["row_group"]])
        assert entry["pair_id"] in {p.pair_id for p in group if p.row == entry["row"]}


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    manifest = make_folder(tmp_path / "a")
    assert load_manifest(tmp_path / "a") == manifest
    again = make_folder(tmp_path / "b")
    assert again == manifest
    assert (tmp_path / "a" / MANIFEST).read_bytes() == (tmp_path / "b" / MANIFEST).read_bytes()


def test_the_manifests_hash_is_the_documented_formula(folder: Path) -> None:
    body = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    stated = body.pop("sha256")
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert stated == hashlib.sha256(text.encode("utf-8")).hexdigest()


def test_every_change_of_the_manifest_by_hand_is_noticed(folder: Path) -> None:
    path = folder / MANIFEST
    text = path.read_text(encoding="utf-8")
    body = json.loads(text)
    assert len(body) == 16
    for key, value in body.items():
        changed = {**body, key: value + 1 if isinstance(value, int) else "changed"}
        path.write_text(json.dumps(changed))
        assert "does not match its own hash" in bad_data(lambda: load_manifest(folder)).what, key
        path.write_text(json.dumps({k: v for k, v in body.items() if k != key}))
        assert bad_data(lambda: load_manifest(folder)).where == str(path)
    # Writing it with other spaces is no change of what it says.
    path.write_text(json.dumps(body, indent=7))
    assert read_all(folder) == list(range(SHARDS * ROWS))


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"null", b"3", b'"text"', b"[]", b'["sha256"]', b"{}", b'{"sha256": 1}', b"\xff\xfe"),
        b'{"\\ud800": 1, "sha256": "a"}',
        b"[" * 200_000,
        b'{"a":' * 200_000,
    ],
    ids=lambda content: str(content[:30]),
)
def test_a_manifest_that_is_none_is_refused(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    error = bad_data(lambda: load_manifest(folder))
    assert error.where == str(folder / MANIFEST)
    assert error.fix is not None
    assert error.fix == f"dpo-opt repair --shards {folder}"


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/passwd",
        "data/../../secret",
        "data/sub/file",
        "data\\file",
        "C:file",
        ".hidden",
        "data/.hidden",
        "..",
        "",
        "a\0b",
        "a\n",
    ],
)
@pytest.mark.parametrize("field", ["file", "dropped_file"])
def test_a_file_name_that_leaves_the_folder_is_refused(folder: Path, name: str, field: str) -> None:
    manifest = load_manifest(folder)
    first = manifest.shards[0].model_copy(update={field: name})
    write_manifest(folder, manifest.model_copy(update={"shards": [first, *manifest.shards[1:]]}))
    error = bad_data(lambda: load_manifest(folder))
    assert "outside the folder" in error.what
    assert repr(name) in error.what


def rewrite_manifest(folder: Path, **changes: Any) -> Path:
    """As another program would: the hash is right, whatever the manifest says."""
    body = {**json.loads((folder / MANIFEST).read_text(encoding="utf-8")), **changes}
    del body["sha256"]
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps({**body, "sha256": digest}))
    return folder


def test_a_value_of_another_kind_is_refused_by_its_field(folder: Path) -> None:
    for key, value in (("rows", "many"), ("kept", float("nan")), ("tokenizer_files", [[1]])):
        before = (folder / MANIFEST).read_bytes()
        rewrite_manifest(folder, **{key: value})
        error = bad_data(lambda: load_manifest(folder))
        assert error.what.startswith(key)
        assert error.why == "nothing else says which files belong to the folder"
        assert error.fix == f"dpo-opt repair --shards {folder}"
        (folder / MANIFEST).write_bytes(before)


def test_keys_of_a_later_version_are_ignored_and_hashed_all_the_same(folder: Path) -> None:
    manifest = load_manifest(folder)
    shards = [{**shard.model_dump(), "rack": "ü"} for shard in manifest.shards]
    rewrite_manifest(folder, written_by="a later version", shards=shards)
    assert load_manifest(folder) == manifest
    assert read_all(folder) == list(range(SHARDS * ROWS))
    path = folder / MANIFEST
    path.write_text(path.read_text().replace("a later version", "somebody else"))
    assert "does not match its own hash" in bad_data(lambda: load_manifest(folder)).what


def test_a_manifest_without_shards_is_refused(folder: Path) -> None:
    rewrite_manifest(folder, shards=[])
    assert bad_data(lambda: load_manifest(folder)).what.startswith("shards: ")


@pytest.mark.parametrize("kind", [Plan, ShardCommit])
def test_other_records_ignore_keys_of_a_later_version(folder: Path, kind: type[BaseModel]) -> None:
    commit = load_manifest(folder).shards[0]
    record = FIRST_PLAN if kind is Plan else commit
    later = {**record.model_dump(), "joules": 3.5}
    read = parse(kind, json.dumps(later), where=folder)
    assert read == record
    assert "joules" not in to_json(read)


def test_a_folder_of_a_later_format_is_refused_before_its_keys_are_read(folder: Path) -> None:
    fingerprint = {**FINGERPRINT.model_dump(), "schema_version": 3, "more": 1}
    rewrite_manifest(folder, fingerprint=fingerprint, rows="of another kind")
    error = bad_data(lambda: load_manifest(folder))
    assert error.what == "the folder has format version 3, this program reads up to 2"
    assert error.where == str(folder)


@pytest.mark.parametrize("bad", ["", "../../../elsewhere/x", "A" * 64, "a" * 63, "a" * 64 + "\n", "g" * 64])
@pytest.mark.parametrize("field", ["dataset_digest", "index_sha256", "tokenizer_sha256"])
def test_a_hash_that_is_none_is_refused_by_its_field(folder: Path, field: str, bad: str) -> None:
    rewrite_manifest(folder, **{field: bad})
    error = bad_data(lambda: load_manifest(folder))
    assert error.what.startswith(f"{field}: ")
    assert error.where == str(folder / MANIFEST)


@pytest.mark.parametrize("bad", ["", "../../../elsewhere/x", "A" * 64])
@pytest.mark.parametrize("field", ["sha256", "dropped_sha256", "rows_digest"])
def test_a_hash_that_is_none_is_refused_by_its_field_and_shard(folder: Path, field: str, bad: str) -> None:
    shards = [shard.model_dump() for shard in load_manifest(folder).shards]
    shards[1][field] = bad
    rewrite_manifest(folder, shards=shards)
    assert bad_data(lambda: load_manifest(folder)).what.startswith(f"shards.1.{field}: ")


def test_every_hash_of_every_record_is_one_by_its_type() -> None:
    """A new one that is any text would be found here."""
    for kind in (Plan, ShardRange, ShardCommit, Manifest):
        for name, field in kind.model_fields.items():
            if "sha256" in name or "digest" in name:
                assert "[0-9a-f]{64}" in str(field.metadata), (kind, name)


def test_what_is_fetched_of_a_tokenizer_is_named_by_the_manifest(folder: Path) -> None:
    assert load_manifest(folder).tokenizer_files == ["tokenizer.json"]
    body = json.loads((folder / MANIFEST).read_text())
    del body["tokenizer_files"], body["sha256"]
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    body["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(body))
    # A folder from before the names were written is read as ever.
    assert load_manifest(folder).tokenizer_files is None
    with ShardFolder.open(folder).tokenizer() as here:
        assert [path.name for path in here.iterdir()] == ["tokenizer.json"]


def test_a_link_out_of_the_folder_is_refused_wherever_a_file_is_read(folder: Path, tmp_path: Path) -> None:
    manifest = load_manifest(folder)
    outside = tmp_path / "outside"
    outside.mkdir()
    readers: dict[str, Callable[[], object]] = {
        manifest.shards[0].file: lambda: read_all(folder),
        INDEX: lambda: ShardFolder.open(folder).index(),
        f"{TOKENIZER}/tokenizer.json": lambda: enter(ShardFolder.open(folder)),
        MANIFEST: lambda: load_manifest(folder),
    }
    for name, read in readers.items():
        file = folder / name
        moved = Path(shutil.move(file, outside / Path(name).name))
        file.symlink_to(moved)
        error = bad_data(read)
        assert "link that leads out of the folder" in error.what, name
        assert Path(str(error.where)).name == file.name
        file.unlink()
        shutil.move(moved, file)
        read()


def test_a_folder_of_links_in_a_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    """Nobody hashes what lies behind it, and transformers would read a template from there."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "default.jinja").write_text("x")
    (folder / TOKENIZER / "additional_chat_templates").symlink_to(outside)
    assert "leads out of" in bad_data(lambda: enter(ShardFolder.open(folder))).what


def test_a_folder_that_was_moved_to_another_disk_is_read_through_its_links(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    for name in ("data", TOKENIZER):
        (folder / name).symlink_to(shutil.move(folder / name, tmp_path / "disk" / name))
    whole = tmp_path / "link"
    whole.symlink_to(folder)
    # A file may be a link to another one of the folder.
    first = whole / load_manifest(whole).shards[0].file
    first.rename(folder / "kept.parquet")
    first.symlink_to(folder / "kept.parquet")
    assert read_all(whole) == list(range(SHARDS * ROWS))
    enter(ShardFolder.open(whole))


def enter(opened: ShardFolder) -> None:
    with opened.tokenizer():
        pass


def test_a_folder_without_a_manifest_says_what_to_do(tmp_path: Path) -> None:
    nothing = bad_data(lambda: ShardFolder.open(tmp_path / "nowhere"))
    assert nothing.where == str(tmp_path / "nowhere")
    assert "dpo-opt precompute" in str(nothing.fix)
    (tmp_path / PLAN).write_text("{}")
    planned = bad_data(lambda: ShardFolder.open(tmp_path))
    assert planned.fix == f"dpo-opt finalize --shards {tmp_path}"


def test_a_fix_is_a_command_whatever_the_folder_is_called(tmp_path: Path) -> None:
    odd = tmp_path / "my $(shards); it's"
    odd.mkdir()
    for text, words in ((None, "precompute"), (b"{", "repair")):
        if text is not None:
            (odd / MANIFEST).write_bytes(text)
        fix = str(bad_data(lambda: ShardFolder.open(odd)).fix)
        assert words in fix
        assert str(odd) in shlex.split(fix.replace("`", " "))


@pytest.mark.parametrize("place", [0, 4, 1000, -1, -5])
def test_a_flipped_byte_of_a_shard_is_noticed_before_its_pairs_are_used(folder: Path, place: int) -> None:
    manifest = load_manifest(folder)
    path = folder / manifest.shards[1].file
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 1
    path.write_bytes(damaged)
    pairs = ShardFolder.open(folder).pairs()
    assert [next(pairs).row for _ in range(ROWS)] == list(range(ROWS))
    error = bad_data(lambda: next(pairs))
    assert "the bytes changed" in error.what
    assert error.where == str(path)


def test_a_flipped_byte_of_the_index_is_noticed(folder: Path) -> None:
    damaged = bytearray((folder / INDEX).read_bytes())
    damaged[500] ^= 1
    (folder / INDEX).write_bytes(damaged)
    assert bad_data(lambda: ShardFolder.open(folder).index()).where == str(folder / INDEX)


def test_a_truncated_a_missing_and_an_exchanged_file_are_noticed(folder: Path) -> None:
    files = [folder / shard.file for shard in load_manifest(folder).shards]
    contents = [path.read_bytes() for path in files]
    files[0].write_bytes(contents[0][:-1])
    assert "the bytes changed" in bad_data(lambda: read_all(folder)).what
    files[0].unlink()
    assert "missing" in bad_data(lambda: read_all(folder)).what
    files[0].write_bytes(contents[1])
    assert "the bytes changed" in bad_data(lambda: read_all(folder)).what
    files[0].write_bytes(contents[0])
    assert read_all(folder) == list(range(SHARDS * ROWS))


def test_files_that_the_manifest_does_not_name_are_ignored(folder: Path) -> None:
    for name in ("data/00000-aaa.parquet", "data/.00001-abc.parquet.1234.tmp", "commits/00000-aaa.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"half")
    assert read_all(folder) == list(range(SHARDS * ROWS))


def test_a_file_is_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpo_opt.schemas import shard_folder

    hashed: list[str] = []
    monkeypatch.setattr(
        shard_folder, "sha256_file", lambda path: hashed.append(path.name) or sha256_file(path)
    )
    opened = ShardFolder.open(folder)
    assert hashed == []
    for _ in range(2):
        assert len(list(opened.pairs())) == SHARDS * ROWS
        opened.index()
    assert sorted(hashed) == sorted([INDEX, *(Path(s.file).name for s in opened.manifest.shards)])


def test_records_have_one_spelling() -> None:
    text = to_json(FIRST_PLAN)
    assert text.endswith("}\n")
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert parse(Plan, text, where=Path("plan.json")) == FIRST_PLAN
    assert to_json(parse(Plan, json.dumps(json.loads(text)), where=Path("plan.json"))) == text


@pytest.mark.parametrize(
    ("text", "named"), [("{", "the file"), (b"\xff", "the file"), ('{"rows": "x"}', "fingerprint")]
)
def test_a_record_that_is_none_is_refused_with_its_field(text: str | bytes, named: str) -> None:
    error = bad_data(lambda: parse(Plan, text, where=Path("plan.json")))
    assert error.where == "plan.json"
    assert error.what.startswith(f"{named}: ")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"\\ud800": 1}', b"\xff\xfe", b"[" * 200_000], ids=len
)
def test_a_models_settings_that_are_none_are_as_good_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MODEL_CONFIG).write_bytes(content)
    assert kept_model_config(tmp_path, digest="d" * 64) is None
