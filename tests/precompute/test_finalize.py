import functools
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fakes import ScriptedScorer, preference_rows, write_jsonl
from refusals import bad_data

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.run import precompute, work
from dpo_opt.precompute.shards.commits import committed, is_committed
from dpo_opt.precompute.shards.finalize import finalize
from dpo_opt.precompute.shards.gc import find_garbage
from dpo_opt.precompute.shards.read_plan import read_plan
from dpo_opt.precompute.shards.repair import repair
from dpo_opt.precompute.shards.status import status
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.manifest import (
    INDEX,
    MANIFEST,
    PLAN,
    ShardCommit,
    ShardRange,
    load_manifest,
    parse,
    to_json,
    write_manifest,
)
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.shards import INDEX_SCHEMA

# Row 4 prefers nothing and is dropped: 4 + 1 shards of 3 rows, the last of 2.
ROWS = preference_rows(14)
ROWS[4]["rejected"] = ROWS[4]["chosen"]


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("commits")
    data = write_jsonl(base / "data.jsonl", ROWS)
    config = config_of(base / "shards", data, tiny_model)
    precompute(config, scorer=ScriptedScorer())
    return base / "shards"


def config_of(shards: Path, data: Path, model: Path) -> PrecomputeConfig:
    return PrecomputeConfig(model=str(model), data=data, shards=shards, pairs_per_shard=3)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A folder whose shards are all committed, and that is not finalized."""
    copy = Path(shutil.copytree(made, tmp_path / "shards"))
    (copy / MANIFEST).unlink()
    (copy / INDEX).unlink()
    return copy


def commit_files(folder: Path) -> list[Path]:
    return sorted((folder / "commits").iterdir())


def read_commit(path: Path) -> ShardCommit:
    return parse(ShardCommit, path.read_bytes(), where=path)


def add_attempt(folder: Path, shard: int, attempt: str, changes: dict[str, object] | None = None) -> None:
    """Another finished attempt at a shard, with the same data under another name."""
    first = read_commit(commit_files(folder)[shard])
    changes = {
        "attempt": attempt,
        "file": f"data/{shard:05d}-{attempt}.parquet",
        "dropped_file": f"dropped/{shard:05d}-{attempt}.parquet",
        **(changes or {}),
    }
    commit = first.model_copy(update=changes)
    shutil.copy(folder / first.file, folder / commit.file)
    shutil.copy(folder / first.dropped_file, folder / commit.dropped_file)
    (folder / "commits" / f"{shard:05d}-{attempt}.json").write_text(to_json(commit))


def test_status_counts_what_is_committed(folder: Path) -> None:
    full = status(folder)
    assert full.model_dump(
        exclude={"pairs_per_second", "seconds_left", "seconds_since_commit", "workers"}
    ) == {
        "shards_total": 5,
        "shards_committed": 5,
        "unpaired": False,
        "pairs_total": 14,
        "pairs_kept": 13,
        "pairs_dropped": 1,
        "dropped": {"identical_completions": 1},
        "share_done": 1.0,
        "finalized": False,
        "lost": [],
        "next": None,
    }
    commit_files(folder)[1].unlink()
    partial = status(folder)
    assert partial.share_done == 11 / 14
    assert partial.seconds_left == 3 / (partial.pairs_per_second or 0)
    assert (partial.shards_committed, partial.pairs_kept, partial.dropped) == (4, 11, {})
    finalize_error = bad_data(lambda: finalize(folder))
    assert "1 of 5 shards is not scored yet (1)" in finalize_error.what


def test_status_needs_a_plan(tmp_path: Path) -> None:
    assert "no plan.json" in bad_data(lambda: status(tmp_path)).what


def test_a_plan_that_is_lost_beside_commits_is_repaired(folder: Path) -> None:
    (folder / "plan.json").unlink()
    with pytest.raises(DataError, match="there is no plan") as caught:
        finalize(folder)
    assert caught.value.fix is not None
    assert "dpo-opt repair" in caught.value.fix


def test_finalize_writes_an_exact_cover(folder: Path) -> None:
    manifest = finalize(folder)
    assert status(folder).finalized
    assert load_manifest(folder) == manifest
    assert (manifest.rows, manifest.kept, manifest.dropped) == (14, 13, {"identical_completions": 1})
    covered = [row for shard in manifest.shards for row in range(shard.start, shard.stop)]
    assert covered == list(range(14))
    pairs = list(ShardFolder.open(folder).pairs())
    assert [p.row for p in pairs] == [row for row in range(14) if row != 4]
    assert manifest.tokens == sum(
        2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs
    )
    assert manifest.dataset_digest == read_plan(folder).dataset_digest


def test_the_index_says_where_each_pair_is(folder: Path) -> None:
    finalize(folder)
    opened = ShardFolder.open(folder)
    table = opened.index()
    assert table.schema.equals(INDEX_SCHEMA)
    expected = [
        {
            "row": p.row,
            "pair_id": p.pair_id,
            "prompt_id": p.prompt_id,
            "prompt_length": len(p.prompt_ids),
            "chosen_length": len(p.chosen_ids),
            "rejected_length": len(p.rejected_ids),
            "shard": shard,
            "row_group": number,
        }
        for shard in range(5)
        for number, group in enumerate(opened.row_groups(shard))
        for p in group
    ]
    assert len(expected) == 13
    assert table.to_pylist() == expected


def test_finalize_again_changes_no_byte(folder: Path) -> None:
    manifest = finalize(folder)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}
    assert finalize(folder) == manifest
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()} == before


def test_finalizing_twice_from_scratch_gives_the_same_bytes(folder: Path) -> None:
    finalize(folder)
    first = [(folder / name).read_bytes() for name in (MANIFEST, INDEX)]
    (folder / MANIFEST).unlink()
    (folder / INDEX).unlink()
    finalize(folder)
    assert [(folder / name).read_bytes() for name in (MANIFEST, INDEX)] == first


def test_a_manifest_keeps_its_entries_when_attempts_are_added(folder: Path) -> None:
    manifest = finalize(folder)
    for shard in range(5):
        add_attempt(folder, shard, "00000000")
    assert finalize(folder) == manifest


def test_of_several_attempts_the_smallest_id_is_taken(folder: Path) -> None:
    own = read_commit(commit_files(folder)[2]).attempt
    add_attempt(folder, 2, "ffffffff0")
    add_attempt(folder, 2, "000000000")
    assert "000000000" < own < "ffffffff0"
    assert committed(folder, read_plan(folder))[2].attempt == "000000000"
    assert [s.attempt for s in finalize(folder).shards][2] == "000000000"


def test_missing_shards_are_counted_and_the_way_out_is_said(folder: Path) -> None:
    for path in commit_files(folder)[1:4]:
        path.unlink()
    error = bad_data(lambda: finalize(folder))
    assert "3 of 5 shards are not scored yet (1, 2, 3)" in error.what
    assert "dpo-opt precompute" in str(error.fix)
    assert not (folder / MANIFEST).exists()
    assert not (folder / INDEX).exists()


@pytest.mark.parametrize(
    "changes",
    [{"start": 4}, {"stop": 7}, {"shard": 17}, {"fingerprint": "other"}],
    ids=lambda c: next(iter(c)),
)
def test_a_commit_of_another_run_does_not_count(folder: Path, changes: dict[str, object]) -> None:
    own = commit_files(folder)[1]
    if "fingerprint" in changes:
        changes = {"fingerprint": read_commit(own).fingerprint.model_copy(update={"dtype": "float16"})}
    add_attempt(folder, 1, "0000", changes)
    assert committed(folder, read_plan(folder))[1] == read_commit(own)
    own.unlink()
    assert 1 not in committed(folder, read_plan(folder))


def test_a_commit_without_its_file_does_not_count(folder: Path) -> None:
    plan = read_plan(folder)
    missing, short = (folder / committed(folder, plan)[i].file for i in (0, 3))
    missing.unlink()
    short.write_bytes(short.read_bytes()[:-1])
    assert sorted(committed(folder, plan)) == [1, 2, 4]


def test_files_of_killed_runs_are_ignored(folder: Path) -> None:
    expected = committed(folder, read_plan(folder))
    for name in (
        "commits/.00001-0000.json.1234abcd.tmp",
        "commits/notes.txt",
        "data/.00001-0000.parquet.1234abcd.tmp",
        "data/00001-0000.parquet",
        ".tokenizer.12ab.tmp/tokenizer.json",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("half")
    assert committed(folder, read_plan(folder)) == expected
    assert [s.attempt for s in finalize(folder).shards] == [expected[i].attempt for i in range(5)]


def test_a_commit_that_names_a_file_outside_the_folder_does_not_count(folder: Path) -> None:
    first, *_ = commit_files(folder)
    (folder.parent / "x.parquet").touch()
    first.write_text(to_json(read_commit(first).model_copy(update={"dropped_file": "../x.parquet"})))
    assert status(folder).shards_committed == len(commit_files(folder)) - 1


def test_a_commit_that_names_the_files_of_another_shard_does_not_count(folder: Path) -> None:
    first, second = (read_commit(path) for path in commit_files(folder)[:2])
    files = {"file", "dropped_file", "bytes", "sha256", "dropped_sha256"}
    changed = first.model_copy(update=second.model_dump(include=files))
    commit_files(folder)[0].write_text(to_json(changed))
    assert "1 of 5 shards is not scored yet (0)" in bad_data(lambda: finalize(folder)).what
    assert (folder / first.file).exists()


@pytest.mark.parametrize(
    "changes", [{"rows": 5, "dropped": {"x": -2}}, {"tokens": -1}, {"truncated": -1}], ids=str
)
def test_a_commit_with_a_count_below_zero_does_not_count(folder: Path, changes: dict[str, object]) -> None:
    path = commit_files(folder)[0]
    path.write_text(to_json(read_commit(path).model_copy(update=changes)))
    assert "1 of 5 shards is not scored yet (0)" in bad_data(lambda: finalize(folder)).what


PLANS: dict[str, Callable[[list[ShardRange]], list[ShardRange]]] = {
    "without its last": lambda shards: shards[:-1],
    "without its first": lambda shards: shards[1:],
    "the last twice": lambda shards: [*shards, shards[-1]],
    "one without rows": lambda shards: [
        *shards,
        shards[-1].model_copy(update={"shard": 5, "start": 14, "stop": 14}),
    ],
    "without any": lambda shards: [],
}


@pytest.mark.parametrize("how", PLANS)
def test_a_plan_whose_shards_do_not_add_up_is_damaged(folder: Path, how: str) -> None:
    expected = (folder / PLAN).read_bytes()
    plan = read_plan(folder)
    (folder / PLAN).write_text(to_json(plan.model_copy(update={"shards": PLANS[how](plan.shards)})))
    for command in (finalize, status):
        error = bad_data(functools.partial(command, folder))
        assert "the shards do not add up" in error.what
        assert error.where == str(folder / PLAN)
        assert error.fix == f"dpo-opt repair --shards {folder}"
    assert not (folder / MANIFEST).exists()
    assert repair(folder).finalized
    assert (folder / PLAN).read_bytes() == expected


def test_a_manifest_whose_shards_do_not_add_up_makes_no_plan(folder: Path) -> None:
    manifest = finalize(folder)
    (folder / PLAN).unlink()
    write_manifest(folder, manifest.model_copy(update={"shards": manifest.shards[:-1]}))
    error = bad_data(lambda: repair(folder))
    assert "its shards end at row 12 of 14" in error.what
    assert error.fix == f"rm {folder / MANIFEST}, then dpo-opt repair --shards {folder}"
    (folder / MANIFEST).unlink()
    assert repair(folder).finalized


def test_a_file_that_is_no_commit_is_left_alone(folder: Path) -> None:
    for name in ("1x.json", "1.json.json", "notes.json"):
        (folder / "commits" / name).write_text("mine")
    assert status(folder).shards_committed == 5


UNREADABLE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda record: b"",
    "cut": lambda record: record[:-20],
    "no JSON": lambda record: b"# " + record,
    "another value": lambda record: b"[]",
    "not UTF-8": lambda record: record.replace(b'"rows"', b'"r\xffws"'),
    "another key": lambda record: record.replace(b'"rows"', b'"lines"'),
    "no number": lambda record: record.replace(b'"rows": 2', b'"rows": "two"'),
    "rows unaccounted for": lambda record: record.replace(b'"rows": 2', b'"rows": 1'),
}


@pytest.mark.parametrize("how", UNREADABLE)
def test_an_unreadable_commit_is_no_commit(folder: Path, tmp_path: Path, tiny_model: Path, how: str) -> None:
    path = commit_files(folder)[1]
    record = path.read_bytes()
    path.write_bytes(UNREADABLE[how](record))
    assert path.read_bytes() != record
    assert status(folder).shards_committed == 4
    plan = read_plan(folder)
    assert [shard.shard for shard in plan.shards if not is_committed(folder, shard, plan)] == [1]
    assert "1 of 5 shards is not scored yet (1)" in bad_data(lambda: finalize(folder)).what
    # What is young may be somebody's at work.
    assert find_garbage(folder, older_than_hours=24).files == []
    config = config_of(folder, write_jsonl(tmp_path / "data.jsonl", ROWS), tiny_model)
    assert work(config, scorer=ScriptedScorer()) == 1
    finalize(folder)


@pytest.mark.parametrize("kind", ["file", "dropped_file"])
def test_a_byte_that_changed_after_the_commit_stops_finalize(folder: Path, kind: str) -> None:
    path = folder / getattr(read_commit(commit_files(folder)[2]), kind)
    damaged = bytearray(path.read_bytes())
    damaged[20] ^= 1
    path.write_bytes(damaged)
    error = bad_data(lambda: finalize(folder))
    assert error.where == str(path)
    assert "the bytes changed" in error.what
    assert not (folder / MANIFEST).exists()


@pytest.mark.parametrize("cut", [True, False])
def test_a_finalized_folder_that_lost_a_file_says_so(folder: Path, cut: bool) -> None:
    manifest = finalize(folder)
    path = folder / manifest.shards[3].file
    if cut:
        path.write_bytes(path.read_bytes()[:100])
    else:
        path.unlink()
    error = bad_data(lambda: finalize(folder))
    assert error.where == str(path)
    assert ("100 bytes of" if cut else "missing") in error.what


def test_a_damaged_manifest_is_not_overwritten(folder: Path) -> None:
    finalize(folder)
    (folder / MANIFEST).write_text("{")
    for command in (finalize, status):
        error = bad_data(functools.partial(command, folder))
        assert error.fix == f"dpo-opt repair --shards {folder}"
    assert (folder / MANIFEST).read_text() == "{"


def test_a_shard_without_a_pair_is_covered_too(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{**row, "rejected": row["chosen"]} if 3 <= i < 6 else row for i, row in enumerate(ROWS[:8])]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    config = PrecomputeConfig(model=str(tiny_model), data=data, shards=tmp_path / "s", pairs_per_shard=3)
    scorer = ScriptedScorer()
    manifest = precompute(config, scorer=scorer)
    assert [s.rows for s in manifest.shards] == [3, 0, 2]
    opened = ShardFolder.open(config.shards)
    assert [p.row for p in opened.pairs()] == [0, 1, 2, 6, 7]
    assert list(itertools.chain(*opened.row_groups(1))) == []
    assert opened.index()["shard"].to_pylist() == [0, 0, 0, 2, 2]
    left_out = pq.read_table(config.shards / manifest.shards[1].dropped_file).to_pylist()
    assert [r["row"] for r in left_out] == [3, 4, 5]
    assert {r["reason"] for r in left_out} == {"identical_completions"}
    # Nobody is asked to score nothing.
    assert all(scorer.calls)
    assert len(scorer.calls) == 2
    assert (config.shards / PLAN).exists()
