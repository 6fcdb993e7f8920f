import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fakes import FINGERPRINT

from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.manifest import (
    INDEX,
    MANIFEST,
    PLAN,
    TOKENIZER,
    Manifest,
    Plan,
    ShardCommit,
    ShardFolder,
    ShardRange,
    load_manifest,
    parse,
    to_json,
    write_manifest,
)
from dpo_opt.schemas.pairs import ScoredPair
from dpo_opt.schemas.shards import INDEX_SCHEMA, write_dropped, write_shard, write_table
from dpo_opt.schemas.storage import sha256_file, sha256_folder

SHARDS, ROWS = 3, 140


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
        file, dropped = f"data/{shard:05d}-abc.parquet", f"data/{shard:05d}-abc.dropped.parquet"
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


def refusal(call: Callable[[], object]) -> DataError:
    with pytest.raises(DataError) as caught:
        call()
    assert caught.value.exit_code == 3
    return caught.value


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
    import hashlib

    body = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    stated = body.pop("sha256")
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert stated == hashlib.sha256(text.encode("utf-8")).hexdigest()


def test_every_change_of_the_manifest_by_hand_is_noticed(folder: Path) -> None:
    path = folder / MANIFEST
    text = path.read_text(encoding="utf-8")
    body = json.loads(text)
    assert len(body) == 12
    for key, value in body.items():
        changed = {**body, key: value + 1 if isinstance(value, int) else "changed"}
        path.write_text(json.dumps(changed))
        assert "does not match its own hash" in refusal(lambda: load_manifest(folder)).what, key
        path.write_text(json.dumps({k: v for k, v in body.items() if k != key}))
        assert refusal(lambda: load_manifest(folder)).where == str(path)
    # Writing it with other spaces is no change of what it says.
    path.write_text(json.dumps(body, indent=7))
    assert read_all(folder) == list(range(SHARDS * ROWS))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"3", b'"text"', b"[]", b'["sha256"]', b"{}", b'{"sha256": 1}', b"\xff\xfe"],
)
def test_a_manifest_that_is_none_is_refused(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    error = refusal(lambda: load_manifest(folder))
    assert error.where == str(folder / MANIFEST)
    assert error.fix is not None
    assert "dpo-opt finalize" in error.fix


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
    error = refusal(lambda: load_manifest(folder))
    assert "outside the folder" in error.what
    assert repr(name) in error.what


def test_a_manifest_with_another_set_of_fields_is_refused_by_name(folder: Path) -> None:
    import hashlib

    for change, named in (({"extra": 1}, "extra"), ({"rows": "many"}, "rows")):
        body = {**json.loads((folder / MANIFEST).read_text()), **change}
        del body["sha256"]
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        digest = hashlib.sha256(text.encode()).hexdigest()
        path = folder / "sub" / MANIFEST
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**body, "sha256": digest}))
        assert refusal(lambda path=path: load_manifest(path.parent)).what.startswith(f"{named}: ")


def test_a_folder_without_a_manifest_says_what_to_do(tmp_path: Path) -> None:
    nothing = refusal(lambda: ShardFolder.open(tmp_path / "nowhere"))
    assert nothing.where == str(tmp_path / "nowhere")
    assert "dpo-opt precompute" in str(nothing.fix)
    (tmp_path / PLAN).write_text("{}")
    planned = refusal(lambda: ShardFolder.open(tmp_path))
    assert planned.fix == f"dpo-opt finalize --shards {tmp_path}"


@pytest.mark.parametrize("place", [0, 4, 1000, -1, -5])
def test_a_flipped_byte_of_a_shard_is_noticed_before_its_pairs_are_used(folder: Path, place: int) -> None:
    manifest = load_manifest(folder)
    path = folder / manifest.shards[1].file
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 1
    path.write_bytes(damaged)
    pairs = ShardFolder.open(folder).pairs()
    assert [next(pairs).row for _ in range(ROWS)] == list(range(ROWS))
    error = refusal(lambda: next(pairs))
    assert "the bytes changed" in error.what
    assert error.where == str(path)


def test_a_flipped_byte_of_the_index_is_noticed(folder: Path) -> None:
    damaged = bytearray((folder / INDEX).read_bytes())
    damaged[500] ^= 1
    (folder / INDEX).write_bytes(damaged)
    assert refusal(lambda: ShardFolder.open(folder).index()).where == str(folder / INDEX)


def test_a_truncated_a_missing_and_an_exchanged_file_are_noticed(folder: Path) -> None:
    files = [folder / shard.file for shard in load_manifest(folder).shards]
    contents = [path.read_bytes() for path in files]
    files[0].write_bytes(contents[0][:-1])
    assert "the bytes changed" in refusal(lambda: read_all(folder)).what
    files[0].unlink()
    assert "missing" in refusal(lambda: read_all(folder)).what
    files[0].write_bytes(contents[1])
    assert "the bytes changed" in refusal(lambda: read_all(folder)).what
    files[0].write_bytes(contents[0])
    assert read_all(folder) == list(range(SHARDS * ROWS))


def test_files_that_the_manifest_does_not_name_are_ignored(folder: Path) -> None:
    for name in ("data/00000-aaa.parquet", "data/.00001-abc.parquet.1234.tmp", "commits/00000-aaa.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"half")
    assert read_all(folder) == list(range(SHARDS * ROWS))


def test_a_file_is_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpo_opt.schemas import manifest

    hashed: list[str] = []
    monkeypatch.setattr(manifest, "sha256_file", lambda path: hashed.append(path.name) or sha256_file(path))
    opened = ShardFolder.open(folder)
    assert hashed == []
    for _ in range(2):
        assert len(list(opened.pairs())) == SHARDS * ROWS
        opened.index()
    assert sorted(hashed) == sorted([INDEX, *(Path(s.file).name for s in opened.manifest.shards)])


def test_records_have_one_spelling() -> None:
    plan = Plan(
        fingerprint=FINGERPRINT,
        dataset_digest="d" * 64,
        rows=2,
        shards=[ShardRange(shard=0, start=0, stop=2, rows_digest="e" * 64)],
    )
    text = to_json(plan)
    assert text.endswith("}\n")
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert parse(Plan, text, where=Path("plan.json")) == plan
    assert to_json(parse(Plan, json.dumps(json.loads(text)), where=Path("plan.json"))) == text


@pytest.mark.parametrize(
    ("text", "named"), [("{", "the file"), (b"\xff", "the file"), ('{"rows": "x"}', "fingerprint")]
)
def test_a_record_that_is_none_is_refused_with_its_field(text: str | bytes, named: str) -> None:
    error = refusal(lambda: parse(Plan, text, where=Path("plan.json")))
    assert error.where == "plan.json"
    assert error.what.startswith(f"{named}: ")
