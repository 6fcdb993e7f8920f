"""What is damaged on disk is scored again, nothing else is, and the result is that of an undisturbed run."""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from bit_flips import flip
from click.testing import CliRunner, Result
from fakes import ScriptedScorer, preference_rows, write_jsonl
from object_store import serve_s3, using_store

from dpo_opt.cli import main
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.run import precompute
from dpo_opt.precompute.shards.finalize import finalize
from dpo_opt.precompute.shards.repair import Repair, repair
from dpo_opt.precompute.shards.status import status
from dpo_opt.schemas.errors import ConfigError, DataError, DpoOptError, FingerprintError
from dpo_opt.schemas.locations import AnyPath, location
from dpo_opt.schemas.manifest import (
    COMMAND,
    COMMITS,
    INDEX,
    MANIFEST,
    PLAN,
    TOKENIZER,
    ShardCommit,
    load_manifest,
    to_json,
    write_manifest,
)
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.storage import sha256_folder
from dpo_opt.verify import verify

# Row 4 prefers nothing and is dropped: 5 shards of 3 rows, the last of 2.
ROWS = preference_rows(14)
ROWS[4]["rejected"] = ROWS[4]["chosen"]
Break = Callable[[Path], object]


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("repair")
    data = write_jsonl(base / "data.jsonl", ROWS)
    precompute(config_of(base / "shards", data, tiny_model), scorer=ScriptedScorer())
    return base


@pytest.fixture
def finished(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "shards", tmp_path / "shards"))


@pytest.fixture
def scored(finished: Path) -> Path:
    """Every shard is committed, and nothing is finalized."""
    (finished / MANIFEST).unlink()
    (finished / INDEX).unlink()
    return finished


def config_of(shards: AnyPath, data: Path, model: Path, *, append: bool = False) -> PrecomputeConfig:
    return PrecomputeConfig(
        model=str(model), data=[str(data)], shards=shards, pairs_per_shard=3, append=append
    )


def commit_files(folder: Path) -> list[Path]:
    return sorted((folder / COMMITS).glob("[0-9]*"))


def named(folder: Path, shard: int, kind: str = "file") -> Path:
    return folder / str(json.loads(commit_files(folder)[shard].read_bytes())[kind])


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def contents(folder: AnyPath) -> list[tuple[object, ...]]:
    """All that training reads, and what was left out."""
    opened = ShardFolder.open(folder)
    left_out = [pq.read_table(folder / c.dropped_file).to_pylist() for c in opened.manifest.shards]
    return [
        *((p.row, p.pair_id, p.source, p.ref_chosen_token_logps.tolist()) for p in opened.pairs()),
        *((tuple(map(str, rows))) for rows in left_out),
        tuple(map(str, opened.index().to_pylist())),
    ]


def go_on(folder: AnyPath, made: Path, model: Path, *, append: bool = False) -> int:
    """What the printed command does; returns how many shards were scored."""
    scorer = ScriptedScorer()
    precompute(config_of(folder, made / "data.jsonl", model, append=append), scorer=scorer)
    return len(scorer.calls)


def command(*words: object) -> Result:
    return CliRunner().invoke(main, list(map(str, words)), catch_exceptions=False)


DAMAGES: dict[str, tuple[int, Break]] = {
    "a flipped bit of a data file": (2, lambda folder: flip(named(folder, 2))),
    "a cut data file": (2, lambda folder: named(folder, 2).write_bytes(b"PAR1")),
    "a lost data file": (3, lambda folder: named(folder, 3).unlink()),
    "a flipped bit of a dropped file": (1, lambda folder: flip(named(folder, 1, "dropped_file"))),
    "a lost dropped file": (1, lambda folder: named(folder, 1, "dropped_file").unlink()),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("is_final", [False, True])
def test_a_damaged_shard_alone_is_scored_again(
    made: Path, finished: Path, tiny_model: Path, name: str, is_final: bool
) -> None:
    shard, damage = DAMAGES[name]
    if not is_final:
        (finished / MANIFEST).unlink()
    damage(finished)
    before = files(finished)
    others = [path.name for path in commit_files(finished) if not path.name.startswith(f"{shard:05d}-")]
    planned = repair(finished, dry_run=True)
    assert files(finished) == before
    done = repair(finished)
    assert done == planned
    assert len(done.damaged) == 1
    assert done.damaged[0].endswith(f"(shard {shard})")
    assert (done.shards_to_score, done.finalized) == ([shard], False)
    settings = finished / COMMAND
    assert done.next == f"dpo-opt precompute --config {settings} --shards {finished}"
    assert not (finished / MANIFEST).exists()
    assert [path.name for path in commit_files(finished)] == others
    assert go_on(finished, made, tiny_model) == 1
    assert contents(finished) == contents(made / "shards")
    assert verify(finished, model=None, num_pairs=1, dtype="auto").ok
    assert repair(finished) == Repair(damaged=[], rebuilt=[], shards_to_score=[], finalized=True, next=None)


@pytest.mark.parametrize("is_final", [False, True])
def test_a_folder_that_is_whole_is_left_as_it_is(finished: Path, is_final: bool) -> None:
    if not is_final:
        (finished / MANIFEST).unlink()
        commit_files(finished)[0].unlink()
    before = files(finished)
    found = repair(finished)
    assert files(finished) == before
    assert (found.damaged, found.rebuilt) == ([], [])
    assert found.shards_to_score == ([] if is_final else [0])
    assert (found.next is None) == is_final


def count_nothing(manifest: Path) -> None:
    """Give the manifest a number that is none, and the hash that is right for it."""
    body = {**json.loads(manifest.read_text()), "kept": float("nan")}
    del body["sha256"]
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    manifest.write_text(json.dumps({**body, "sha256": hashlib.sha256(text.encode()).hexdigest()}))


REBUILT: dict[str, tuple[Break, list[str]]] = {
    "an index that was damaged": (lambda folder: flip(folder / INDEX), [MANIFEST]),
    "an index that was lost": (lambda folder: (folder / INDEX).unlink(), [MANIFEST]),
    "a manifest that was cut": (lambda folder: (folder / MANIFEST).write_text("{"), [MANIFEST]),
    "a manifest that was edited": (
        lambda folder: (folder / MANIFEST).write_text(
            (folder / MANIFEST).read_text().replace('"rows": 14', '"rows": 15')
        ),
        [MANIFEST],
    ),
    "a manifest that was lost": (lambda folder: (folder / MANIFEST).unlink(), [MANIFEST]),
    "a plan that was lost": (lambda folder: (folder / PLAN).unlink(), [PLAN]),
    "a plan that was cut": (lambda folder: (folder / PLAN).write_bytes(b""), [PLAN]),
    "a deep manifest": (lambda folder: (folder / MANIFEST).write_text("[" * 200_000), [MANIFEST]),
    "a manifest with half a character": (
        lambda folder: (folder / MANIFEST).write_text('{"\\ud800": 1, "sha256": "a"}'),
        [MANIFEST],
    ),
    "a manifest of another program": (lambda folder: count_nothing(folder / MANIFEST), [MANIFEST]),
    "plan and index": (
        lambda folder: (flip(folder / INDEX), (folder / PLAN).write_text("[]")),
        [PLAN, MANIFEST],
    ),
    "plan and manifest": (
        lambda folder: ((folder / MANIFEST).unlink(), (folder / PLAN).write_text("[]")),
        [PLAN, MANIFEST],
    ),
}


@pytest.mark.parametrize("name", REBUILT)
def test_records_that_follow_from_others_are_made_again_and_nothing_is_scored(
    made: Path, finished: Path, tiny_model: Path, name: str
) -> None:
    damage, rebuilt = REBUILT[name]
    before = files(finished)
    named_before = load_manifest(finished)
    planned = repair_after(damage, finished)
    assert planned.rebuilt == rebuilt
    assert (planned.shards_to_score, planned.next, planned.finalized) == ([], None, True)
    # The same bytes: nothing of it says when it was made.
    assert files(finished) == before
    assert load_manifest(finished) == named_before
    assert go_on(finished, made, tiny_model) == 0


def edit_tokenizer(folder: Path, edit: Callable[[Any], object]) -> None:
    path = folder / TOKENIZER / "tokenizer.json"
    content = json.loads(path.read_text())
    edit(content["model"])
    path.write_text(json.dumps(content))


TOKENIZERS: dict[str, Break] = {
    "a flipped bit": lambda folder: flip(folder / TOKENIZER / "tokenizer.json"),
    "a lost file": lambda folder: (folder / TOKENIZER / "tokenizer.json").unlink(),
    "all of it": lambda folder: shutil.rmtree(folder / TOKENIZER),
    "no JSON": lambda folder: (folder / TOKENIZER / "tokenizer.json").write_text("{"),
    # Which the tokenizers library refuses by a bare Exception.
    "a merge of nothing": lambda folder: edit_tokenizer(
        folder, lambda model: model["vocab"].update({"hi": model["vocab"].pop("he")})
    ),
    "another one": lambda folder: edit_tokenizer(
        folder, lambda model: model["vocab"].update(he=model["vocab"]["in"], **{"in": model["vocab"]["he"]})
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("is_final", [False, True])
def test_the_tokenizers_files_are_taken_from_the_model_again(
    finished: Path, is_final: bool, name: str
) -> None:
    before = files(finished)
    if not is_final:
        (finished / MANIFEST).unlink()
    done = repair_after(TOKENIZERS[name], finished)
    assert len(done.damaged) == 1
    assert done.rebuilt == ["tokenizer/", MANIFEST]
    assert done.finalized
    assert files(finished) == before


@pytest.mark.parametrize("name", TOKENIZERS)
def test_finalize_pins_no_other_tokenizer(finished: Path, name: str) -> None:
    before = files(finished)
    (finished / MANIFEST).unlink()
    TOKENIZERS[name](finished)
    with pytest.raises(DataError) as caught:
        finalize(finished)
    assert caught.value.where == str(finished / TOKENIZER)
    assert caught.value.fix == f"dpo-opt repair --shards {finished}"
    assert not (finished / MANIFEST).exists()
    assert repair(finished).finalized
    assert files(finished) == before


def test_another_tokenizer_that_a_manifest_names_is_replaced(finished: Path) -> None:
    before = files(finished)
    TOKENIZERS["another one"](finished)
    changed = {"tokenizer_sha256": sha256_folder(finished / TOKENIZER)}
    write_manifest(finished, load_manifest(finished).model_copy(update=changed))
    done = repair(finished)
    assert done.damaged == [f"{finished / TOKENIZER}: it is not the tokenizer whose ids were scored"]
    assert files(finished) == before


def test_the_tokenizer_of_another_model_replaces_nothing(
    finished: Path, tmp_path: Path, tiny_model: Path
) -> None:
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    TOKENIZERS["another one"](finished)
    shutil.copy(finished / TOKENIZER / "tokenizer.json", other)
    settings = finished / COMMAND
    settings.write_text(settings.read_text().replace(str(tiny_model), str(other)))
    before = files(finished)
    with pytest.raises(FingerprintError, match="not the one whose ids were scored"):
        repair(finished)
    settings.unlink()
    with pytest.raises(DataError, match=f"tokenizer/ is lost or damaged, and there is no {COMMAND}"):
        repair(finished)
    assert {**files(finished), COMMAND: before[COMMAND]} == before


def repair_after(damage: Break, folder: Path) -> Repair:
    """Also compares what a dry run says with what is done."""
    damage(folder)
    before = files(folder)
    said = repair(folder, dry_run=True)
    assert files(folder) == before
    done = repair(folder)
    assert done.model_copy(update={"finalized": said.finalized}) == said
    return done


def test_a_lost_commit_matters_before_the_manifest_only(made: Path, finished: Path, tiny_model: Path) -> None:
    commit_files(finished)[2].unlink()
    before = files(finished)
    assert repair(finished).finalized
    assert files(finished) == before
    # A copy for readers has none of them, and what the manifest says of them is all there is.
    shutil.rmtree(finished / COMMITS)
    (finished / PLAN).unlink()
    (finished / COMMAND).unlink()
    flip(finished / load_manifest(finished).shards[2].file)
    done = repair(finished)
    assert done.shards_to_score == [2]
    assert done.next == f"dpo-opt precompute --model M --data DATA --shards {finished}"
    assert len(done.rebuilt) == 5  # the plan, and the commits of the others
    assert go_on(finished, made, tiny_model) == 1
    assert contents(finished) == contents(made / "shards")


def test_a_lost_commit_before_finalize_is_one_shard(made: Path, scored: Path, tiny_model: Path) -> None:
    commit_files(scored)[2].unlink()
    assert repair(scored).shards_to_score == [2]
    assert go_on(scored, made, tiny_model) == 1
    assert contents(scored) == contents(made / "shards")


def another_attempt(shards: Path, own: ShardCommit, attempt: str) -> ShardCommit:
    """A shard once more, as another worker would have committed it."""
    new = {name: getattr(own, name).replace(own.attempt, attempt) for name in ("file", "dropped_file")}
    for name, file in new.items():
        shutil.copy(shards / getattr(own, name), shards / file)
    other = own.model_copy(update={"attempt": attempt, **new})
    (shards / COMMITS / f"{own.shard:05}-{attempt}.json").write_text(to_json(other))
    return other


def test_another_attempt_that_is_whole_takes_the_place_of_a_damaged_one(made: Path, finished: Path) -> None:
    (record,) = [path for path in commit_files(finished) if path.name.startswith("00002-")]
    own = load_manifest(finished).shards[2]
    other = another_attempt(finished, own, "ffffffff0")
    flip(finished / own.file)
    done = repair(finished)
    assert (done.shards_to_score, done.finalized) == ([], True)
    assert not record.exists()
    assert load_manifest(finished).shards[2] == other
    assert contents(finished) == contents(made / "shards")


def test_what_the_manifest_named_is_named_again(made: Path, finished: Path, tiny_model: Path) -> None:
    """Also where another attempt has a smaller id, which would win without the manifest."""
    before = load_manifest(finished).shards
    another_attempt(finished, before[0], "0000")
    flip(finished / before[2].file)
    repair(finished)
    assert go_on(finished, made, tiny_model) == 1
    after = load_manifest(finished).shards
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False, True, True]


def test_a_damaged_manifest_without_other_records_is_not_thrown_away(finished: Path) -> None:
    commit_files(finished)[1].unlink()
    (finished / MANIFEST).write_text("{")
    before = files(finished)
    with pytest.raises(DataError, match="1 scored shard without a commit") as caught:
        repair(finished)
    assert caught.value.fix is not None
    assert files(finished) == before


def test_unreadable_commits_are_taken_away(made: Path, scored: Path, tiny_model: Path) -> None:
    commit_files(scored)[4].write_bytes(b"")
    done = repair(scored)
    assert [line.rpartition(": ")[2] for line in done.damaged] == ["not readable as a commit"]
    assert len(commit_files(scored)) == 4
    assert go_on(scored, made, tiny_model) == 1


@pytest.mark.parametrize("attempt", ["0badc0de", "/../../victim", "/../../../victim"])
def test_a_commit_goes_whatever_it_calls_itself_and_nothing_else_does(
    made: Path, scored: Path, tiny_model: Path, attempt: str
) -> None:
    victims = [scored.parent / "victim.json", scored / "victim.json"]
    record = commit_files(scored)[2]
    record.write_text(json.dumps({**json.loads(record.read_bytes()), "attempt": attempt}))
    flip(named(scored, 2))
    (scored / COMMITS / "00002-").mkdir()
    for victim in victims:
        victim.write_text("mine")
    assert repair(scored).shards_to_score == [2]
    assert not record.exists()
    assert all(victim.exists() for victim in victims)
    assert go_on(scored, made, tiny_model) == 1


def test_a_plan_is_made_again_from_the_data_it_was_of_only(
    made: Path, scored: Path, tiny_model: Path, other_model: Path
) -> None:
    (scored / PLAN).write_text("{")
    settings = (scored / COMMAND).read_text()
    other = write_jsonl(scored.parent / "other.jsonl", preference_rows(13))
    before = files(scored)
    (scored / COMMAND).write_text(settings.replace(str(made / "data.jsonl"), str(other)))
    with pytest.raises(DataError, match="shard 1 is not one of the data"):
        repair(scored)
    (scored / COMMAND).write_text(settings.replace(str(tiny_model), str(other_model)))
    with pytest.raises(FingerprintError, match="weights"):
        repair(scored)
    for content in ("{", "[]", None):
        (scored / COMMAND).unlink() if content is None else (scored / COMMAND).write_text(content)
        with pytest.raises(DataError, match=f"plan.json is lost or damaged, and there is no {COMMAND}"):
            repair(scored)
    (scored / COMMAND).write_text(settings)
    assert files(scored) == before
    assert repair(scored).finalized


SETTINGS = {
    "{}": "names no model",
    "a: 1": "names no model",
    "model: 3": "names no model",
    "model: [3]": "names no model",
    "model: a\ndata: b\nworker_indexx: 3": r"does not fit \(worker_indexx: ",
    "model: a": r"does not fit \(data: ",
    "1: 2\nmodel: a": "does not fit",
    "[" * 20_000: "there is no",
    "a: 2020-99-99": "there is no",
    "a: !!timestamp x": "there is no",
    "a: !!bool x": "there is no",
}


@pytest.mark.parametrize("content", SETTINGS, ids=lambda content: repr(content[:30]))
def test_settings_that_are_none_make_nothing_again(scored: Path, content: str) -> None:
    (scored / COMMAND).write_text(content)
    plan = (scored / PLAN).read_bytes()
    for lost in (PLAN, f"{TOKENIZER}/"):
        if lost == PLAN:
            (scored / PLAN).unlink()
        else:
            shutil.rmtree(scored / TOKENIZER)
        reason = SETTINGS[content]
        if lost == PLAN or "does not fit" not in reason:
            with pytest.raises(DataError, match=f"{lost} is lost or damaged, and .*{reason}") as caught:
                repair(scored)
        else:  # which needs the model alone
            with pytest.raises(ConfigError, match="there is no model folder 'a'") as caught:
                repair(scored)
        assert caught.value.fix
        (scored / PLAN).write_bytes(plan)


def test_an_index_that_is_a_link_to_nothing_is_written(made: Path, scored: Path) -> None:
    (scored / INDEX).symlink_to("nowhere")
    finalize(scored)
    assert not (scored / INDEX).is_symlink()
    assert contents(scored) == contents(made / "shards")


def test_a_folder_that_holds_nothing_is_no_folder_of_shards(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"there is no {PLAN}"):
        repair(tmp_path)
    (tmp_path / PLAN).write_text("{")
    with pytest.raises(DataError, match="nothing is scored yet") as caught:
        repair(tmp_path)
    assert str(caught.value.fix).startswith(f"rm -r {tmp_path}")


@pytest.mark.parametrize("lost", ["plan.json", "plan-1.json", "both", "manifest"])
def test_a_folder_that_grew_is_repaired(finished: Path, tiny_model: Path, lost: str) -> None:
    rows = [*ROWS, *preference_rows(18)[14:]]
    data = write_jsonl(finished.parent / "data.jsonl", rows)
    precompute(config_of(finished, data, tiny_model, append=True), scorer=ScriptedScorer())
    grown = contents(finished)
    for name in {"both": ["plan.json", "plan-1.json"], "manifest": [MANIFEST]}.get(lost, [lost]):
        (finished / name).write_text("{")
    flip(finished / sorted((finished / "data").glob("00005-*[0-9a-f].parquet"))[0])
    done = repair(finished)
    assert done.shards_to_score == [5]
    assert go_on(finished, finished.parent, tiny_model) == 1
    assert contents(finished) == grown
    assert status(finished).finalized


def test_a_folder_that_was_to_grow_and_lost_that_plan_is_planned_again(
    finished: Path, tiny_model: Path
) -> None:
    rows = [*ROWS, *preference_rows(18)[14:]]
    data = write_jsonl(finished.parent / "data.jsonl", rows)
    first = (finished / MANIFEST).read_bytes()
    precompute(config_of(finished, data, tiny_model, append=True), scorer=ScriptedScorer())
    grown = contents(finished)
    (finished / MANIFEST).write_bytes(first)
    (finished / "plan-1.json").write_text("{")
    done = repair(finished)
    assert str(done.next).endswith(" --append")
    assert done.finalized  # readers have the part from before
    assert go_on(finished, finished.parent, tiny_model, append=True) == 0
    assert contents(finished) == grown


def lose_records(folder: Path) -> None:
    """What only the manifest holds must be written before it goes."""
    shutil.rmtree(folder / COMMITS)
    flip(folder / load_manifest(folder).shards[2].file)


FULL: dict[str, Break] = {
    "a shard": lambda folder: flip(named(folder, 2)),
    "index and plan": REBUILT["plan and index"][0],
    "records": lose_records,
    "tokenizer": TOKENIZERS["a flipped bit"],
}


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_costs_a_repair_nothing_that_was_good(
    finished: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the first file that must be whole, at the second, and so on."""
    FULL[name](finished)
    damaged = files(finished)
    undisturbed = shutil.copytree(finished, finished.parent / "undisturbed")
    done = repair(undisturbed)
    sync, left = os.fsync, 0

    def fill(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    for at in range(100):
        folder = shutil.copytree(finished, finished.parent / f"full-{at}")
        left = at
        with monkeypatch.context() as full:
            full.setattr(os, "fsync", fill)
            try:
                repair(folder)
                break
            except DpoOptError as error:
                said = str(error)
        assert "the disk is full" in said
        assert "free some space" in said
        there = files(folder)
        # What ``finalize`` has chosen is one whole private file, which gc removes.
        half = there.keys() - damaged.keys() - files(undisturbed).keys()
        assert all(re.fullmatch(r"\.manifest\.json\.\w+\.tmp", file) for file in half)
        for file, content in files(undisturbed).items():
            # These go before they are made again from the commits.
            gone = [None] if file in (MANIFEST, INDEX) else []
            assert there.get(file) in (damaged.get(file), content, *gone), (at, file)
        again = repair(folder)
        assert (again.shards_to_score, again.finalized) == (done.shards_to_score, done.finalized)
        assert {k: v for k, v in files(folder).items() if k not in half} == files(undisturbed)
    assert at > 0 or not done.rebuilt


def test_a_disk_that_is_really_full_leaves_the_folder_as_it_is(finished: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a small tmpfs")
    try:
        folder = Path(shutil.copytree(finished, small / "shards"))
        before = files(folder)
        TOKENIZERS["a flipped bit"](folder)
        damaged = files(folder)
        with pytest.raises(OSError, match="No space left"):
            (small / "filler").write_bytes(bytes(2**20))
        with pytest.raises(DpoOptError, match="the disk is full"):
            repair(folder)
        assert files(folder) == damaged
        (small / "filler").unlink()
        assert repair(folder).finalized
        assert files(folder) == before
    finally:
        # Lazily: a traceback may still hold a file.
        subprocess.run(["umount", "--lazy", str(small)], check=True)


@pytest.mark.parametrize("alive", [True, False])
def test_a_shard_that_a_worker_is_at_stays_that_workers(
    made: Path, finished: Path, tiny_model: Path, alive: bool
) -> None:
    """A repair leaves its mark and whatever it has written; what goes on then waits for it."""
    flip(named(finished, 2))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        mark = finished / COMMITS / ".00002.00000000.tmp"
        mark.write_text(json.dumps([socket.gethostname(), process.pid, "0badc0de"]))
        begun = finished / "data" / "00002-0badc0de.parquet"
        begun.write_bytes(b"PAR1")
        assert repair(finished).shards_to_score == [2]
        assert mark.exists()
        assert begun.exists()
        if not alive:
            process.kill()
            process.wait()
        with ThreadPoolExecutor() as pool:
            scored = pool.submit(go_on, finished, made, tiny_model)
            if alive:
                with pytest.raises(TimeoutError):
                    scored.result(timeout=2)
                mark.unlink()
            assert scored.result(timeout=20) == 1
        process.stdin.close()
    assert contents(finished) == contents(made / "shards")


def test_a_repair_beside_a_worker_takes_nothing_of_what_it_commits(made: Path, tiny_model: Path) -> None:
    folder = made / "beside"
    repaired: list[Repair] = []

    def repair_meanwhile(calls: int) -> None:
        if calls == 2:
            flip(named(folder, 0))
            repaired.append(repair(folder))

    config = config_of(folder, made / "data.jsonl", tiny_model)
    with pytest.raises(DataError, match=r"1 of 5 shards is not scored yet \(0\)") as caught:
        precompute(config, scorer=ScriptedScorer(before_call=repair_meanwhile))
    (done,) = repaired
    assert done.shards_to_score == [0, 2, 3, 4]
    assert caught.value.fix == done.next
    assert go_on(folder, made, tiny_model) == 1
    assert contents(folder) == contents(made / "shards")


def test_the_command_line_says_what_is_damaged_and_what_goes_on(finished: Path) -> None:
    flip(named(finished, 2))
    for dry_run in ([("--dry-run")], []):
        result = command("repair", "--shards", finished, *dry_run)
        assert result.exit_code == 0
        assert "the bytes changed" in result.stdout
        assert "dpo-opt precompute --config" in result.stdout
    found = json.loads(command("repair", "--shards", finished, "--json").stdout)
    assert found["shards_to_score"] == [2]


@pytest.mark.filterwarnings("ignore:.*s3fs.*")
def test_a_folder_in_a_store_is_repaired_there(made: Path, finished: Path, tiny_model: Path) -> None:
    flip(named(finished, 2))
    with serve_s3("bucket") as url, using_store(url):
        store = location("s3://bucket/shards")
        assert not isinstance(store, Path)
        store.fs.put(str(finished), store.path, recursive=True)
        assert repair(store).shards_to_score == [2]
        assert go_on(store, made, tiny_model) == 1
        finalize(store)
        assert [p.row for p in ShardFolder.open(store).pairs()] == [r for r in range(14) if r != 4]


def test_a_shard_that_this_version_would_score_otherwise_costs_no_record(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_opt.precompute.shards.repair.TEXT_TO_IDS", "another")
    assert repair(finished).damaged == []
    named(finished, 2).unlink()
    before = files(finished)
    with pytest.raises(FingerprintError, match="another version of dpo-opt scored the folder"):
        repair(finished)
    assert files(finished) == before


def test_a_lost_plan_is_not_made_again_with_other_weights(tmp_path: Path, tiny_model: Path) -> None:
    folder, data = tmp_path / "shards", tmp_path / "data.jsonl"
    write_jsonl(data, [row | {"weight": 1.0} for row in ROWS])
    precompute(config_of(folder, data, tiny_model), scorer=ScriptedScorer())
    for lost in (PLAN, MANIFEST):
        (folder / lost).unlink()
    write_jsonl(data, [row | {"weight": 2.0} for row in ROWS])
    (planned,) = (folder / "columns").iterdir()
    with pytest.raises(DataError, match="the data gives other weights") as refused:
        repair(folder)
    assert str(refused.value.fix).startswith(f"restore the data, or rm {planned}")
    # The second way out: the data is right as it is now.
    planned.unlink()
    assert repair(folder).finalized
    assert ShardFolder.open(folder).has_column("weight")
