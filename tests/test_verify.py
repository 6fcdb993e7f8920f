import contextlib
import json
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bit_flips import flip
from command_line import invoke
from fakes import ScriptedScorer, preference_rows, weight_file, write_jsonl
from object_store import serve_s3, using_store

from dpo_opt.folder_notes import VERDICT, folder_notes
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.run import precompute, work
from dpo_opt.precompute.shards.finalize import finalize
from dpo_opt.precompute.shards.gc import find_garbage, remove_garbage
from dpo_opt.schemas.errors import DataError, FingerprintError
from dpo_opt.schemas.locations import location
from dpo_opt.schemas.manifest import (
    COMMITS,
    INDEX,
    MANIFEST,
    PLAN,
    TOKENIZER,
    Manifest,
    ShardCommit,
    load_manifest,
    to_json,
    write_manifest,
)
from dpo_opt.schemas.shards import write_table
from dpo_opt.schemas.storage import file_names, sha256_file, sha256_folder
from dpo_opt.schemas.weights import weights_digest
from dpo_opt.verify import Verdict, verify

# Row 4 prefers nothing and is dropped. Two shards of 8 rows, one of 4.
ROWS = preference_rows(20)
ROWS[4]["rejected"] = ROWS[4]["chosen"]
ROWS[2]["weight"] = 2.0
ROWS[4]["weight"] = 3.0


def make_shards(folder: Path, model: Path, *, scripted: bool) -> Path:
    from dpo_opt.optimize.transformers_scorer import HfScorer

    data = write_jsonl(folder / "data.jsonl", ROWS)
    config = PrecomputeConfig(model=str(model), data=data, shards=folder / "shards", pairs_per_shard=8)
    precompute(config, scorer=ScriptedScorer() if scripted else HfScorer(model, dtype="float32"))
    return config.shards


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("verify"), tiny_model, scripted=False)


@pytest.fixture
def shards(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "shards"))


def check(shards: Path, model: Path | None = None, *, num_pairs: int = 64) -> Verdict:
    return verify(shards, model=None if model is None else str(model), num_pairs=num_pairs, dtype="auto")


# Integrity ------------------------------------------------------------------------------------------------


def test_a_whole_folder_is_ok(shards: Path) -> None:
    verdict = check(shards)
    found = verdict.as_dict()
    assert found["integrity"] == {"ok": True, "problems": []}
    assert (found["ok"], found["parity"], found["notes"]) == (True, None, [])
    verdict.require_ok()


def test_every_damaged_file_is_named(shards: Path) -> None:
    files = [shards / INDEX, shards / TOKENIZER / "tokenizer.json"]
    for shard in load_manifest(shards).shards:
        files += [shards / shard.file, shards / shard.dropped_file]
    assert len(files) == 8
    whole = {path: path.read_bytes() for path in files}
    for path in files:
        for damage in (lambda p: flip(p, 100), lambda p: flip(p, -1), Path.unlink):
            damage(path)
            (problem,) = check(shards).problems
            assert str(path if path.parent.name != TOKENIZER else path.parent) in problem
            assert path.name in problem or not path.exists()
            with pytest.raises(DataError, match=r"1 problem$"):
                raise_without_details(check(shards))
            path.write_bytes(whole[path])
    assert check(shards).problems == []


def raise_without_details(verdict: Verdict) -> None:
    try:
        verdict.require_ok()
    except DataError as error:
        raise DataError(error.what) from error


def test_all_problems_are_named_at_once(shards: Path) -> None:
    for shard in load_manifest(shards).shards:
        flip(shards / shard.file, 200)
    shutil.rmtree(shards / TOKENIZER)
    verdict = check(shards)
    assert len(verdict.problems) == 4
    assert not verdict.as_dict()["integrity"]["ok"]


def test_a_damaged_file_does_not_hide_bad_rows_of_another(shards: Path) -> None:
    bad = rewrite(shards, CHANGES["nan"][0])
    last = shards / load_manifest(shards).shards[2].file
    flip(last, 100)
    problems = check(shards).problems
    assert any(p.startswith(f"{bad}: row 1 has a log-prob of nan (rejected, token 0)") for p in problems)
    assert any(p.startswith(f"{last}: the bytes changed") for p in problems)


def test_a_folder_that_is_not_finished_says_which_command_goes_on(shards: Path) -> None:
    (shards / MANIFEST).unlink()
    with pytest.raises(DataError, match="no manifest") as caught:
        check(shards)
    assert caught.value.fix == f"dpo-opt finalize --shards {shards}"
    assert not (shards / VERDICT).exists()


def forge(shards: Path, change: Callable[[Manifest], Manifest]) -> None:
    """Rewrite the manifest as a careless program would: with its right hash."""
    write_manifest(shards, change(load_manifest(shards)))


def with_first(manifest: Manifest, **changes: Any) -> Manifest:
    first, *others = manifest.shards
    return manifest.model_copy(update={"shards": [first.model_copy(update=changes), *others]})


def rewrite(shards: Path, change: Callable[[pa.Table], pa.Table]) -> Path:
    """Replace a shard, and write its right hash and size to the manifest."""
    path = shards / load_manifest(shards).shards[0].file
    write_table(path, change(pq.read_table(path)))
    forge(shards, lambda m: with_first(m, sha256=sha256_file(path), bytes=path.stat().st_size))
    return path


def set_column(table: pa.Table, name: str, row: int, value: object) -> pa.Table:
    values = table[name].to_pylist()
    values[row] = value
    return table.set_column(
        table.schema.get_field_index(name), table.field(name), pa.array(values, table.field(name).type)
    )


def without_metadata(table: pa.Table, key: bytes, value: bytes | None) -> pa.Table:
    metadata = {**table.schema.metadata, key: value}
    return table.replace_schema_metadata({k: v for k, v in metadata.items() if v is not None})


CHANGES: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "log_prob": (
        lambda t: set_column(t, "ref_chosen_token_logps", 2, [-1.0] * len(t["chosen_ids"][2])),
        "row 2 has a ref_chosen_logps that does not follow",
    ),
    "token": (
        lambda t: set_column(t, "chosen_ids", 2, [5] * len(t["chosen_ids"][2])),
        "row 2 has a pair_id that does not follow",
    ),
    "nan": (
        lambda t: set_column(t, "ref_rejected_token_logps", 1, [float("nan")] * len(t["rejected_ids"][1])),
        "row 1 has a log-prob of nan (rejected, token 0)",
    ),
    "infinity": (
        lambda t: set_column(
            t, "ref_chosen_token_logps", 1, [-1.0, -float("inf"), *[-1.0] * (len(t["chosen_ids"][1]) - 2)]
        ),
        "row 1 has a log-prob of -inf (chosen, token 1)",
    ),
    "length": (
        lambda t: set_column(t, "ref_rejected_token_logps", 1, [-1.0]),
        "row 1 has 1 log-probs for ",
    ),
    "positive": (
        lambda t: set_column(t, "ref_chosen_token_logps", 0, [1.0] * len(t["chosen_ids"][0])),
        "row 0 has a log-prob of 1.0 (chosen, token 0)",
    ),
    "empty_prompt": (lambda t: set_column(t, "prompt_ids", 0, []), "row 0 has an empty prompt"),
    "negative_id": (lambda t: set_column(t, "prompt_ids", 0, [-1]), "row 0 has a negative token id"),
    "lost_row": (lambda t: t.slice(1), "6 rows, the manifest says 7"),
    "lost_row_by_number": (lambda t: t.slice(1), "row 0 is neither kept nor dropped"),
    "row_twice": (lambda t: set_column(t, "row", 3, 2), "row 2 does not belong here, or twice"),
    "foreign_row": (lambda t: set_column(t, "row", 3, 12), "row 12 does not belong here, or twice"),
    "order": (
        lambda t: pa.concat_tables([t.slice(1, 1), t.slice(0, 1), t.slice(2)]),
        "row 0 comes after row 1",
    ),
    "truncated": (lambda t: set_column(t, "chosen_truncated", 0, True), "1 truncated, the manifest says 0"),
    "other_shard": (lambda t: without_metadata(t, b"dpo_opt.shard", b"1"), "it says it is shard 1, not 0"),
    "fingerprint": (
        lambda t: without_metadata(
            t,
            b"dpo_opt.fingerprint",
            t.schema.metadata[b"dpo_opt.fingerprint"].replace(b"float32", b"float16"),
        ),
        "it was scored for another dtype than the manifest says",
    ),
    "no_fingerprint": (
        lambda t: without_metadata(t, b"dpo_opt.fingerprint", None),
        "it does not say what it was scored for",
    ),
    "version": (lambda t: without_metadata(t, b"dpo_opt.schema_version", b"9"), "schema version 9"),
    "column": (lambda t: t.drop_columns(["prompt_ids"]), "lacks the columns prompt_ids"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_rows_that_do_not_hold_together_are_named(shards: Path, name: str) -> None:
    change, message = CHANGES[name]
    path = rewrite(shards, change)
    problems = check(shards).problems
    assert any(p.startswith(f"{path}: ") and message in p for p in problems), problems
    # The index and the dropped rows are checked against the shard, so they may disagree with it.
    assert all(str(path) in p or str(load_manifest(shards).shards[0].dropped_file) in p for p in problems)


def test_a_rewritten_but_equal_shard_is_ok(shards: Path) -> None:
    rewrite(shards, lambda table: table)
    assert check(shards).problems == []


def test_a_file_with_many_bad_rows_does_not_hide_another(shards: Path) -> None:
    path = rewrite(shards, lambda t: pa.concat_tables([set_column(t, "row", 0, 100 + i) for i in range(9)]))
    flip(shards / load_manifest(shards).shards[1].file, 100)
    problems = check(shards).problems
    assert sum(p.startswith(f"{path}: ") for p in problems) == 6
    assert f"{path}: and more of this file" in problems
    assert any("the bytes changed" in p for p in problems)


FORGED: dict[str, tuple[Callable[[Manifest], Manifest], str]] = {
    "kept": (lambda m: m.model_copy(update={"kept": 18}), "it says kept 18, its shards add up to 19"),
    "tokens": (lambda m: m.model_copy(update={"tokens": 1}), "it says tokens 1, its shards add up to"),
    "dropped": (lambda m: m.model_copy(update={"dropped": {}}), "it says dropped {}, its shards add up to"),
    "rows": (lambda m: m.model_copy(update={"rows": 21}), "its shards end at row 20 of 21"),
    "lost_shard": (lambda m: m.model_copy(update={"shards": m.shards[:2]}), "its shards end at row 16 of 20"),
    "order": (lambda m: m.model_copy(update={"shards": m.shards[::-1]}), "its entry 0 is shard 2"),
    "gap": (lambda m: with_first(m, stop=7), "shard 1 has rows 8 to 16, the shard before ends at 7"),
    "unaccounted": (lambda m: with_first(m, rows=6), "accounts for 6 kept and 1 dropped"),
    "fingerprint": (
        lambda m: with_first(m, fingerprint=m.fingerprint.model_copy(update={"dtype": "float16"})),
        "shard 0 was scored for another fingerprint than the folder's",
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_manifest_that_does_not_add_up_is_named(shards: Path, name: str) -> None:
    change, message = FORGED[name]
    forge(shards, change)
    problems = check(shards).problems
    assert any(p.startswith(f"{shards / MANIFEST}: ") and message in p for p in problems), problems


def test_sizes_and_dropped_rows_are_compared_with_the_manifest(shards: Path) -> None:
    first = load_manifest(shards).shards[0]
    forge(shards, lambda m: with_first(m, bytes=5))
    assert any("bytes, the manifest says 5" in p for p in check(shards).problems)
    path = shards / first.dropped_file
    table = pq.read_table(path)
    assert table["row"].to_pylist() == [4]
    for change, message in (
        (lambda t: set_column(t, "row", 0, 5), "row 5 is kept as well"),
        (lambda t: set_column(t, "row", 0, 50), "row 50 does not belong here, or twice"),
        (lambda t: set_column(t, "reason", 0, "none"), "it lists {'none': 1}, the manifest says"),
        (lambda t: t.slice(1), "it lists {}, the manifest says"),
        (lambda t: t.drop_columns(["reason"]), "it lacks the columns reason"),
    ):
        write_table(path, change(table))
        forge(shards, lambda m: with_first(m, bytes=first.bytes, dropped_sha256=sha256_file(path)))
        problems = check(shards).problems
        assert any(p.startswith(f"{path}: {message}") for p in problems), problems


@pytest.mark.parametrize(
    ("column", "value"),
    [("row", 77), ("pair_id", "ab"), ("prompt_length", 9), ("shard", 1), ("row_group", 3)],
)
def test_an_index_that_disagrees_with_its_shard_is_named(shards: Path, column: str, value: object) -> None:
    table = set_column(pq.read_table(shards / INDEX), column, 3, value)
    write_table(shards / INDEX, table)
    forge(shards, lambda m: m.model_copy(update={"index_sha256": sha256_file(shards / INDEX)}))
    (problem,) = check(shards).problems
    assert problem.startswith(f"{shards / INDEX}: row ")
    assert f"has {column} {value}, its shard says" in problem


@pytest.mark.parametrize("length", [0, 5, 18])
def test_an_index_without_some_rows_is_named(shards: Path, length: int) -> None:
    write_table(shards / INDEX, pq.read_table(shards / INDEX).slice(0, length))
    forge(shards, lambda m: m.model_copy(update={"index_sha256": sha256_file(shards / INDEX)}))
    assert f"{shards / INDEX}: {length} rows, the manifest says 19" in check(shards).problems


def test_columns_are_checked_by_row(shards: Path) -> None:
    planned = weight_file(shards)
    # Row 4 is dropped, and has a weight all the same.
    assert pq.read_table(planned)["row"].to_pylist() == [2, 4]
    path = planned.with_name("weight.parquet")
    for rows, values, message in (
        ([2, 20], [1.0, 1.0], "row 20 is not in this folder"),
        ([-1], [1.0], "row -1 is not in this folder"),
        ([2, 2], [1.0, 2.0], "row 2 has 2 values"),
        ([2], [float("nan")], "row 2 has the value nan"),
        ([2], [-1.0], "row 2 has the value -1.0"),
        (["a"], [1.0], 'not a column "weight" by row'),
        ([2], ["b"], 'not a column "weight" by row'),
    ):
        pq.write_table(pa.table({"row": rows, "weight": values}), path)
        (problem,) = check(shards).problems
        assert problem.startswith(f"{path}: {message}"), problem
    path.write_bytes(b"")
    assert check(shards).problems[0].startswith(f'{path}: not a column "weight" by row')
    path.unlink()
    before = planned.read_bytes()
    pq.write_table(pa.table({"row": [2], "weight": [1.0]}), planned)
    assert check(shards).problems == [
        f"{planned}: its values are not those of the plan, whose hash is in its name"
    ]
    planned.unlink()
    (problem,) = check(shards).problems
    assert problem.startswith(f"{planned}: missing; dpo-opt precompute"), problem
    planned.write_bytes(before)
    # Another column may hold negative numbers.
    pq.write_table(pa.table({"row": [2], "margin": [-1.0]}), path.with_name("margin.parquet"))
    assert check(shards).problems == []


# What is only unusual -------------------------------------------------------------------------------------


def test_extra_files_are_named_and_fail_nothing(shards: Path) -> None:
    for name in (
        "notes.txt",
        "data/old/a.parquet",
        "data/00001-0123abcd.parquet",
        ".index.parquet.0123abcd.tmp",
    ):
        (shards / name).parent.mkdir(exist_ok=True)
        (shards / name).write_text("x")
    verdict = check(shards)
    assert verdict.problems == []
    left, unknown = verdict.notes
    assert f"dpo-opt gc --shards {shards}" in left
    assert left.endswith(": .index.parquet.0123abcd.tmp, data/00001-0123abcd.parquet")
    assert unknown.endswith(": data/old/a.parquet, notes.txt")


PRIVATE = [
    ".index.parquet.0123abcd.tmp",
    ".manifest.json.0123abcd.tmp",
    ".tokenizer.0123abcd.tmp/tokenizer.json",
    ".tokenizer.0123abcd.tmp/more/vocabulary.txt",
    "columns/.weight.parquet.0123abcd.tmp",
    "commits/.00001-0123abcd.json.0123abcd.tmp",
    "data/.00001-0123abcd.parquet.0123abcd.tmp",
    "dropped/.00001-0123abcd.parquet.0123abcd.tmp",
    "slurm/.array.sbatch.0123abcd.tmp",
    "plan.json.claim",
    "data/00001-0123abcd.parquet",
    "dropped/00001-0123abcd.parquet",
    "commits/00001-0123abcd.json",
]


def test_gc_removes_what_verify_says_it_does_and_nothing_else(shards: Path) -> None:
    own = set(shards.rglob("*"))
    strangers = [
        "notes.txt",
        "note.claim",
        "mine/.x.0123abcd.tmp",
        "mine/plan.json.claim",
        "data/more/.x.0123abcd.tmp",
        "columns/.x.tmp",
    ]
    for name in (*PRIVATE, *strangers):
        (shards / name).parent.mkdir(exist_ok=True, parents=True)
        (shards / name).write_text("x")
    left, unknown = check(shards).notes
    # A commit is no reader's.
    assert set(left.partition(": ")[2].split(", ")) == set(PRIVATE) - {"commits/00001-0123abcd.json"}
    assert set(unknown.partition(": ")[2].split(", ")) == set(strangers)
    times = {path: path.stat().st_mtime_ns for path in [shards, *shards.rglob("*")]}
    found = find_garbage(shards, older_than_hours=0, look_only=True)
    assert {path: path.stat().st_mtime_ns for path in [shards, *shards.rglob("*")]} == times
    assert found == find_garbage(shards, older_than_hours=0)
    assert {str(path.relative_to(shards)) for path in found.files} == set(PRIVATE)
    assert found.size == len(PRIVATE)
    assert find_garbage(shards, older_than_hours=1).files == []
    remove_garbage(found)
    assert check(shards).notes == [unknown]
    there = {path for path in shards.rglob("*") if path.name != VERDICT}
    assert there - own == {shards / name for name in strangers} | {
        shards / folder for folder in ("mine", "data/more", "slurm")
    }


def test_files_that_others_write_and_remove_meanwhile_are_no_error(shards: Path) -> None:
    """A process that writes, and another gc, for as long as this one looks."""
    manifest, done = load_manifest(shards), threading.Event()

    def write_and_remove() -> None:
        private = [shards / f".{i}.0123abcd.tmp" / "more" / "deep" for i in range(20)]
        while not done.is_set():
            for folder in private:
                with contextlib.suppress(FileNotFoundError, FileExistsError):
                    folder.mkdir(parents=True)
                    (folder / "x").touch()
            for folder in private:
                shutil.rmtree(folder.parents[1], ignore_errors=True)

    def collect() -> None:
        while not done.is_set():
            remove_garbage(find_garbage(shards, older_than_hours=0))

    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(write_and_remove), pool.submit(collect)]
        try:
            for _ in range(40):
                find_garbage(shards, older_than_hours=0)
                find_garbage(shards, older_than_hours=0, look_only=True)
                folder_notes(shards, manifest)
                file_names(shards)
        finally:
            done.set()
    assert [other.result(5) for other in others] == [None, None]
    assert check(shards).ok


def test_what_gc_keeps_is_not_said_to_be_removed_by_it(shards: Path) -> None:
    """A commit beyond the manifest may be of a plan that is lost."""
    manifest = load_manifest(shards)
    last = manifest.shards[-1]
    names = {"file": "data/00009-0123abcd.parquet", "dropped_file": "dropped/00009-0123abcd.parquet"}
    beyond = last.model_copy(update={**names, "shard": 9, "attempt": "0123abcd"})
    for name, own in ((names["file"], last.file), (names["dropped_file"], last.dropped_file)):
        shutil.copyfile(shards / own, shards / name)
    (shards / "commits" / "00009-0123abcd.json").write_text(to_json(beyond))
    (note,) = check(shards).notes
    assert note.startswith("scored for rows that no plan and no manifest here has (`dpo-opt gc` keeps them")
    assert note.endswith(f": {names['file']}, {names['dropped_file']}")
    assert find_garbage(shards, older_than_hours=0).files == []
    # A data file without a commit is of a killed attempt.
    (shards / "commits" / "00009-0123abcd.json").unlink()
    (note,) = check(shards).notes
    assert note.startswith("left by other attempts (`dpo-opt gc")
    assert {str(p.relative_to(shards)) for p in find_garbage(shards, older_than_hours=0).files} == {
        *names.values()
    }


@pytest.mark.parametrize("plan", [PLAN, "plan-1.json"])
def test_a_claim_whose_plan_does_not_stand_is_a_run_in_progress(shards: Path, plan: str) -> None:
    (shards / PLAN).unlink()
    claim = shards / f"{plan}.claim"
    claim.write_text("x")
    (missing, note) = check(shards).notes
    assert "plan.json is missing" in missing
    assert note.startswith("claim of a run that is planning, or that was killed at it and goes on")
    assert note.endswith(f": {claim.name}")


def test_gc_keeps_the_claim_of_a_run_in_progress(shards: Path) -> None:
    for name in ("plan.json.claim", "plan-1.json.claim"):
        (shards / name).write_text("x")
    assert find_garbage(shards, older_than_hours=0).files == [shards / "plan.json.claim"]
    (shards / "plan-1.json").write_bytes((shards / PLAN).read_bytes())
    found = find_garbage(shards, older_than_hours=0)
    assert found.files == [shards / "plan-1.json.claim", shards / "plan.json.claim"]
    assert find_garbage(shards, older_than_hours=1).files == []
    remove_garbage(found)
    assert not list(shards.glob("*.claim"))


def test_notes_name_commands_that_a_shell_takes_as_they_are(shards: Path) -> None:
    odd = shards.rename(shards.parent / "my $(shards); it's")
    (odd / "data" / "00001-0123abcd.parquet").write_text("x")
    (note,) = check(odd).notes
    assert shlex.split(note.split("`")[1])[-1] == str(odd)


def test_a_column_that_is_a_link_out_of_the_folder_is_named(shards: Path) -> None:
    file = weight_file(shards)
    file.symlink_to(shutil.move(file, shards.parent / "elsewhere.parquet"))
    (problem,) = check(shards).problems
    assert problem == f"{file}: the file is a link that leads out of the folder"


def test_what_readers_do_not_need_may_be_gone(shards: Path) -> None:
    shutil.rmtree(shards / COMMITS)
    assert check(shards).notes == []
    (shards / PLAN).write_text("{")
    (note,) = check(shards).notes
    assert note.startswith(f"{shards / PLAN}: ")
    (shards / PLAN).unlink()
    (note,) = check(shards).notes
    assert "plan.json is missing; readers do not need it" in note
    assert check(shards).ok


def test_the_plan_of_another_run_is_noted(shards: Path) -> None:
    plan = json.loads((shards / PLAN).read_text())
    (shards / PLAN).write_text(json.dumps({**plan, "dataset_digest": "0" * 64}))
    (note,) = check(shards).notes
    assert "is that of another run" in note


def test_a_folder_that_has_grown_is_checked_by_its_own_index(tiny_model: Path, tmp_path: Path) -> None:
    config = PrecomputeConfig(
        model=str(tiny_model),
        data=write_jsonl(tmp_path / "data.jsonl", ROWS[:10]),
        shards=tmp_path / "shards",
        pairs_per_shard=4,
    )
    precompute(config, scorer=ScriptedScorer())
    write_jsonl(tmp_path / "data.jsonl", ROWS)
    assert work(config.model_copy(update={"append": True}), scorer=ScriptedScorer()) == 3
    growing = check(tmp_path / "shards")
    assert growing.problems == [], "columns know rows that no shard has yet"
    (note,) = growing.notes
    assert "the folder is growing to 20 rows" in note
    finalize(tmp_path / "shards")
    grown = check(tmp_path / "shards")
    assert grown.ok
    (note,) = grown.notes
    assert note.startswith(
        "indexes of earlier manifests, for readers that opened the folder then (`dpo-opt gc "
    )
    assert note.endswith(": index.parquet")
    flip(tmp_path / "shards" / grown.manifest.index_file, 100)
    (problem,) = check(tmp_path / "shards").problems
    assert problem.startswith(f"{tmp_path / 'shards' / 'index-20.parquet'}: the bytes changed")


# Parity ---------------------------------------------------------------------------------------------------


def test_the_model_that_was_scored_passes(shards: Path, tiny_model: Path) -> None:
    verdict = check(shards, tiny_model, num_pairs=7)
    verdict.require_ok()
    parity = verdict.as_dict()["parity"]
    assert set(parity) >= {"pairs", "tokens", "mean", "sd", "p99", "max", "floor_sd", "ok"}
    assert parity["ok"]
    assert parity["pairs"] == 7
    assert parity["max"] < 5e-3
    names = [prefix + name for prefix in ("", "alone ", "floor ") for name in ("mean", "sd", "p99", "max")]
    assert [check["name"] for check in parity["checks"]] == [*names, "loss"]
    assert (parity["dtype"], parity["cached_dtype"], parity["device"]) == ("float32", "float32", "cpu")
    json.dumps(parity)


def test_another_model_is_refused_by_its_weights(shards: Path, other_model: Path) -> None:
    with pytest.raises(FingerprintError, match="weights") as caught:
        check(shards, other_model)
    assert caught.value.exit_code == 4
    assert not (shards / VERDICT).exists()


def test_numbers_that_are_not_the_models_fail_parity(tiny_model: Path, tmp_path: Path) -> None:
    shards = make_shards(tmp_path, tiny_model, scripted=True)
    assert check(shards).problems == []
    verdict = check(shards, tiny_model)
    assert not verdict.as_dict()["parity"]["ok"]
    assert not json.loads((shards / VERDICT).read_text())["ok"]
    with pytest.raises(FingerprintError, match="the cached log-probs are not those of"):
        verdict.require_ok()


def test_parity_is_not_measured_on_damaged_shards(shards: Path, tiny_model: Path) -> None:
    flip(shards / load_manifest(shards).shards[0].file, 300)
    verdict = check(shards, tiny_model)
    assert verdict.problems
    assert verdict.parity is None


def test_a_tokenizer_that_changed_before_it_was_hashed_is_noticed(shards: Path, tiny_model: Path) -> None:
    path = shards / TOKENIZER / "tokenizer.json"
    path.write_text(path.read_text().replace('"<s>"', '"<q>"'))
    forge(shards, lambda m: m.model_copy(update={"tokenizer_sha256": sha256_folder(shards / TOKENIZER)}))
    for model in (None, tiny_model):
        (problem,) = check(shards, model).problems
        assert problem == f"{shards / TOKENIZER}: it is not the tokenizer whose ids were scored"


def test_what_transformers_makes_of_the_tokenizers_files_is_compared_with_a_model(
    shards: Path, tiny_model: Path
) -> None:
    path = shards / TOKENIZER / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": "<s>"}))
    forge(shards, lambda m: m.model_copy(update={"tokenizer_sha256": sha256_folder(shards / TOKENIZER)}))
    (problem,) = check(shards, tiny_model).problems
    assert problem == f"{shards / TOKENIZER}: it is not the tokenizer whose ids were scored"


# The record -----------------------------------------------------------------------------------------------


def recorded(shards: Path) -> Any:
    return json.loads((shards / VERDICT).read_text())


def test_the_verdict_names_what_it_is_about(shards: Path, tiny_model: Path) -> None:
    before = sha256_file(shards / MANIFEST)
    verdict = check(shards, tiny_model)
    assert recorded(shards) == verdict.as_dict()
    assert recorded(shards)["weights"] == weights_digest(tiny_model)
    assert recorded(shards)["manifest_sha256"] == json.loads((shards / MANIFEST).read_text())["sha256"]
    assert sha256_file(shards / MANIFEST) == before
    # It is no part of the folder: neither does it change a later verdict, nor is it noted.
    assert check(shards, tiny_model).as_dict() == verdict.as_dict()
    assert check(shards).as_dict()["weights"] is None
    forge(shards, lambda m: m.model_copy(update={"dataset_digest": "0" * 64}))
    assert recorded(shards)["manifest_sha256"] != json.loads((shards / MANIFEST).read_text())["sha256"]


def test_a_bad_verdict_is_recorded_too(shards: Path) -> None:
    flip(shards / INDEX, 100)
    check(shards)
    assert recorded(shards)["ok"] is False
    assert str(shards / INDEX) in recorded(shards)["integrity"]["problems"][0]


def test_a_folder_that_may_only_be_read_is_verified_all_the_same(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, text: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("dpo_opt.verify.write_text", refuse)
    verdict = check(shards)
    assert verdict.ok
    assert verdict.notes == ["verify.json could not be written (Permission denied)"]


# The command ----------------------------------------------------------------------------------------------


def run(*arguments: object) -> tuple[int, str, str]:
    result = invoke("verify", *arguments)
    return result.exit_code, result.stdout, result.stderr


def test_the_command_says_it_in_words(shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    code, shown, _ = run("--shards", shards)
    assert code == 0
    assert "19 pairs of 20 rows in 3 shards, scored by transformers in float32" in shown
    assert "integrity ok" in shown
    assert "not measured: pass --model" in shown

    code, shown, _ = run("--shards", shards, "--model", tiny_model, "--pairs", 5)
    assert code == 0
    assert "parity    ok: 5 pairs, " in shown
    lines = [line.split() for line in shown.splitlines()]
    for name in ("mean", "sd", "p99", "max"):
        assert next(line for line in lines if line[0] == name)[-1] == "ok"
    assert "margin noise" in shown

    (tmp_path / "other").mkdir()
    scripted = make_shards(tmp_path / "other", tiny_model, scripted=True)
    code, shown, error = run("--shards", scripted, "--model", tiny_model)
    assert code == 4
    assert "parity    FAILED" in shown
    assert "FAILED: noise beyond rounding" in shown
    again = (
        f"dpo-opt precompute --model {tiny_model} --config {scripted}/precompute.yaml --shards OTHER_FOLDER"
    )
    assert again in error

    flip(shards / load_manifest(shards).shards[1].file, 100)
    code, shown, error = run("--shards", shards, "--model", tiny_model)
    assert code == 3
    assert "integrity FAILED: 1 found" in shown
    assert load_manifest(shards).shards[1].file in shown
    assert "not measured: the files must be whole first" in shown
    assert "1 problem" in error


def test_integrity_needs_no_torch(shards: Path) -> None:
    """It is asked on login nodes and in the scoring environment."""
    code = "import sys; from dpo_opt.cli import main; main(sys.argv[1:], standalone_mode=False)"
    code += "; print([m for m in ('torch', 'transformers', 'vllm', 'polars') if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code, "verify", "--shards", str(shards)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


def test_commits_are_no_part_of_what_is_verified(shards: Path) -> None:
    """A reader trusts the manifest alone, so a damaged commit is no damage of the folder."""
    commit = next((shards / COMMITS).iterdir())
    ShardCommit.model_validate_json(commit.read_bytes())
    commit.write_text("{")
    assert check(shards).ok


@pytest.mark.filterwarnings("ignore:.*s3fs.*")
def test_a_folder_in_a_store_is_verified_there(
    shards: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPO_OPT_CACHE", str(tmp_path / "cache"))
    (shards / "notes.txt").write_text("mine")
    with serve_s3("bucket") as url, using_store(url):
        store = location("s3://bucket/shards")
        assert not isinstance(store, Path)
        store.fs.put(str(shards), store.path, recursive=True)
        verdict = verify(store, model=str(tiny_model), num_pairs=4, dtype="auto")
        verdict.require_ok()
        assert verdict.parity is not None
        (note,) = verdict.notes
        assert note.endswith(": notes.txt")
        assert json.loads((store / VERDICT).read_text()) == verdict.as_dict()
        # Parity has put the shards into this user's cache; what counts is what the store holds.
        damaged = store / load_manifest(store).shards[1].file
        data = bytearray(damaged.read_bytes())
        data[len(data) // 2] ^= 1
        damaged.write_bytes(bytes(data))
        (store / "tokenizer" / "tokenizer.json").unlink()
        shard, tokenizer = verify(store, model=None, num_pairs=1, dtype="auto").problems
        assert shard.startswith(f"{damaged}: the bytes changed")
        assert tokenizer.startswith(f"{store / TOKENIZER}: ")
