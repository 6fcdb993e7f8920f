"""Of several attempts at a shard the manifest names one, and only its files stay, whoever races or dies."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fakes import ScriptedScorer, preference_rows, write_jsonl

from dpo_opt.precompute import run
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.run import precompute, work
from dpo_opt.precompute.shards import commits
from dpo_opt.precompute.shards import finalize as finalize_module
from dpo_opt.precompute.shards.commits import committed
from dpo_opt.precompute.shards.finalize import finalize
from dpo_opt.precompute.shards.gc import find_garbage, remove_garbage
from dpo_opt.precompute.shards.read_plan import read_plan
from dpo_opt.precompute.shards.repair import repair
from dpo_opt.precompute.workers import assignment
from dpo_opt.schemas.attempts import AttemptName
from dpo_opt.schemas.errors import DataError, FingerprintError
from dpo_opt.schemas.locations import AnyPath
from dpo_opt.schemas.manifest import COMMITS, DATA, DROPPED, INDEX, MANIFEST, load_manifest, to_json
from dpo_opt.schemas.shard_folder import ShardFolder

ROWS = preference_rows(12)
ROWS[4]["rejected"] = ROWS[4]["chosen"]


class Killed(BaseException):
    """As SIGKILL: nothing is tidied up after it."""


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("lost")
    precompute(config_of(tiny_model, base), scorer=ScriptedScorer())
    return base


def config_of(model: Path, base: Path) -> PrecomputeConfig:
    data = write_jsonl(base / "data.jsonl", ROWS)
    return PrecomputeConfig(
        model=str(model),
        data=data,
        shards=base / "shards",
        pairs_per_shard=4,
        worker_index=0,
        num_workers=1,
    )


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """All shards are committed, one of them three times, and nothing is finalized."""
    copy = Path(shutil.copytree(made / "shards", tmp_path / "shards"))
    (copy / MANIFEST).unlink()
    (copy / INDEX).unlink()
    add_attempt(copy, 1, "ffffffff")
    return copy


def add_attempt(folder: Path, shard: int, attempt: str, *, committed_too: bool = True) -> None:
    first = committed(folder, read_plan(folder))[shard]
    name = f"{shard:05d}-{attempt}"
    commit = first.model_copy(
        update={
            "attempt": attempt,
            "file": f"{DATA}/{name}.parquet",
            "dropped_file": f"{DROPPED}/{name}.parquet",
        }
    )
    shutil.copy(folder / first.file, folder / commit.file)
    shutil.copy(folder / first.dropped_file, folder / commit.dropped_file)
    if committed_too:
        (folder / COMMITS / f"{name}.json").write_text(to_json(commit))


def require_settled(folder: Path, *, rows: int = 11) -> None:
    """The records, data files and lists of dropped rows are exactly the manifest's."""
    manifest = load_manifest(folder)
    wanted = {(COMMITS, f"{c.shard:05d}-{c.attempt}.json") for c in manifest.shards}
    wanted |= {(DATA, Path(c.file).name) for c in manifest.shards}
    wanted |= {(DROPPED, Path(c.dropped_file).name) for c in manifest.shards}
    there = {(name, path.name) for name in (COMMITS, DATA, DROPPED) for path in (folder / name).iterdir()}
    assert there == wanted
    assert len({pair.row for pair in ShardFolder.open(folder).pairs()}) == rows
    assert len(ShardFolder.open(folder).index()) == rows
    assert not list(folder.rglob("*.tmp"))


def test_finalize_leaves_the_chosen_attempts_alone(folder: Path) -> None:
    add_attempt(folder, 2, "eeeeeeee", committed_too=False)
    stranger = folder / DATA / "notes.txt"
    stranger.write_text("mine")
    finalize(folder)
    assert stranger.read_text() == "mine"
    stranger.unlink()
    require_settled(folder)
    # What a worker that was killed afterwards leaves is gone after the next one.
    add_attempt(folder, 0, "00000000")
    finalize(folder)
    require_settled(folder)


def test_a_finalize_that_is_killed_at_any_step_is_ended_by_the_next(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = ("publish", "write_manifest", "write_text", "remove", "read_all", "load_manifest")
    expected = [p.pair_id for p in ShardFolder.open(finalized_copy(folder, tmp_path / "whole")).pairs()]
    for number in range(100):
        copy = Path(shutil.copytree(folder, tmp_path / str(number)))
        left = number

        def dying(function: Callable[..., object]) -> Callable[..., object]:
            def step(*arguments: object, **settings: object) -> object:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return function(*arguments, **settings)

            return step

        with monkeypatch.context() as patch:
            for module in (finalize_module, commits):
                for name in filter(vars(module).__contains__, steps):
                    patch.setattr(module, name, dying(getattr(module, name)))
            try:
                finalize(copy)
            except Killed:
                pass
            else:
                break
        if (copy / MANIFEST).exists():
            assert [p.pair_id for p in ShardFolder.open(copy).pairs()] == expected
        # Meanwhile another attempt was committed, with a smaller name than those that were seen.
        add_attempt(copy, 0, "00000000")
        finalize(copy)
        require_settled(copy)
    assert number == 10, "a step was added: is it safe to die before it?"


def finalized_copy(folder: Path, place: Path) -> Path:
    copy = Path(shutil.copytree(folder, place))
    finalize(copy)
    return copy


@pytest.mark.parametrize("step", ["write_manifest", "_overtaken", "_usable", "_remove_lost_attempts"])
def test_two_that_finalize_with_other_attempts_in_view_publish_one_choice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    original = getattr(finalize_module, step)

    def meanwhile(*arguments: object, **settings: object) -> object:
        monkeypatch.setattr(finalize_module, step, original)
        # Smaller than the one that the first has chosen, so the second chooses it.
        add_attempt(folder, 1, "00000000")
        found.append(finalize(folder))
        return original(*arguments, **settings)

    found: list[object] = []
    monkeypatch.setattr(finalize_module, step, meanwhile)
    found.append(finalize(folder))
    assert found[0] == found[1] == load_manifest(folder)
    require_settled(folder)


def test_a_choice_of_files_that_are_gone_is_made_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(finalize_module, "_overtaken", dies)
        with pytest.raises(Killed):
            finalize(folder)
    (choice,) = folder.glob(f".{MANIFEST}.*.tmp")
    chosen = committed(folder, read_plan(folder))[1]
    # Removed by somebody because it was damaged: record first.
    (folder / COMMITS / f"00001-{chosen.attempt}.json").unlink()
    assert chosen != committed(folder, read_plan(folder))[1]
    assert finalize(folder).shards[1] != chosen
    assert not choice.exists()
    require_settled(folder)


STEPS = ("verified_index", "write_index", "write_manifest")
"""What ``finalize`` has done when something else happens to the folder."""


def after(monkeypatch: pytest.MonkeyPatch, step: str, happens: Callable[[], object]) -> None:
    original = getattr(finalize_module, step)

    def then(*arguments: object, **settings: object) -> object:
        monkeypatch.setattr(finalize_module, step, original)
        done = original(*arguments, **settings)
        happens()
        return done

    monkeypatch.setattr(finalize_module, step, then)


@pytest.mark.parametrize("step", STEPS)
def test_a_manifest_of_more_rows_is_not_replaced(
    made: Path, folder: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    data = write_jsonl(tmp_path / "more.jsonl", [*ROWS, *preference_rows(20)[12:]])
    changes = {"data": [str(data)], "shards": folder, "append": True}
    config = config_of(tiny_model, made).model_copy(update=changes)
    grown: list[object] = []
    after(monkeypatch, step, lambda: grown.append(precompute(config, scorer=ScriptedScorer())))
    assert [finalize(folder)] == grown == [load_manifest(folder)]
    assert load_manifest(folder).rows == 20
    assert list(folder.glob(f".{MANIFEST}.*")) == []


@pytest.mark.parametrize("step", STEPS)
def test_a_commit_that_repair_removed_meanwhile_is_not_published(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def damage_and_repair() -> None:
        file = folder / committed(folder, read_plan(folder))[2].file
        file.write_bytes(bytes(file.stat().st_size))
        assert repair(folder).shards_to_score == [2]

    after(monkeypatch, step, damage_and_repair)
    with pytest.raises(DataError, match=r"1 of 3 shards is not scored yet \(2\)"):
        finalize(folder)
    assert not (folder / MANIFEST).exists()
    assert list(folder.glob(f".{MANIFEST}.*")) == []


@pytest.mark.parametrize("step", STEPS)
def test_a_folder_that_was_planned_anew_meanwhile_is_left_as_it_is(
    folder: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    rows = [{**row, "chosen": f"{row['chosen']} Or so."} for row in ROWS]
    data = write_jsonl(tmp_path / "other.jsonl", rows)
    other = config_of(tiny_model, tmp_path).model_copy(update={"data": [str(data)], "shards": folder})
    found: list[dict[Path, bytes]] = []

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def plan_anew() -> None:
        shutil.rmtree(folder)
        work(other, scorer=ScriptedScorer())
        found.append(files())

    after(monkeypatch, step, plan_anew)
    with pytest.raises((FingerprintError, DataError)):
        finalize(folder)
    assert [files()] == found


def test_an_attempt_whose_commit_is_of_something_else_is_not_removed(folder: Path) -> None:
    own = committed(folder, read_plan(folder))[1]
    add_attempt(folder, 1, "0badc0de")
    record = folder / COMMITS / "00001-0badc0de.json"
    fingerprint = own.fingerprint.model_copy(update={"dtype": "float16"})
    foreign = commits.read_commit(record.read_bytes())
    assert foreign is not None
    record.write_text(to_json(foreign.model_copy(update={"fingerprint": fingerprint})))
    manifest = finalize(folder)
    assert manifest.shards[1] == own
    assert all((folder / name).exists() for name in (foreign.file, foreign.dropped_file))
    assert record.exists()
    # Until then a plain reader sees its pairs too.
    rows = [pair.row for pair in ShardFolder.open(folder).pairs()]
    assert sorted(plain_rows(folder)) == sorted([*rows, *plain_rows(folder, foreign.file)])
    remove_garbage(find_garbage(folder, older_than_hours=0))
    assert sorted(plain_rows(folder)) == rows


def plain_rows(folder: Path, names: str = f"{DATA}/*.parquet") -> list[int]:
    files = folder.glob(names)
    return [row for file in files for row in pq.read_table(file, columns=["row"])["row"].to_pylist()]


MOMENTS = ("score_pairs", "write_dropped", "sha256_file", "write_text", "withdraw_if_lost")
"""What a worker calls when another may have finished the folder: from scoring to its last look."""


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_worker_that_comes_after_finalize_withdraws(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    config = config_of(tiny_model, tmp_path)
    module = run if moment == "score_pairs" else commits
    original = getattr(module, moment)

    def late(*arguments: object, **settings: object) -> object:
        monkeypatch.setattr(module, moment, original)
        # Another worker takes this one for dead, does the whole rest, and finalizes.
        monkeypatch.setattr(assignment._Marks, "_patience", lambda *_: 0.0)
        precompute(config, scorer=ScriptedScorer())
        return original(*arguments, **settings)

    monkeypatch.setattr(module, moment, late)
    assert work(config, scorer=ScriptedScorer()) == 1
    require_settled(config.shards)
    assert load_manifest(config.shards).kept == 11


def test_a_worker_whose_shard_is_damaged_in_the_folder_does_not_withdraw(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = config_of(tiny_model, tmp_path)
    manifest = precompute(config, scorer=ScriptedScorer())
    planned = read_plan(config.shards).shards[1]

    def withdraws(attempt: str) -> bool:
        name = AttemptName(1, attempt)
        return commits.withdraw_if_lost(config.shards, name, planned, manifest.fingerprint)

    assert withdraws("12345678")
    assert not withdraws(manifest.shards[1].attempt)
    (config.shards / manifest.shards[1].file).unlink()
    assert not withdraws("12345678")


@pytest.mark.parametrize("other", ["rows", "model"])
def test_a_worker_does_not_withdraw_for_the_manifest_of_something_else(
    tiny_model: Path, tmp_path: Path, other: str
) -> None:
    config = config_of(tiny_model, tmp_path)
    fingerprint = precompute(config, scorer=ScriptedScorer()).fingerprint
    planned = read_plan(config.shards).shards[1]
    if other == "rows":
        planned = planned.model_copy(update={"rows_digest": "0" * 64})
    else:
        fingerprint = fingerprint.model_copy(update={"weights": "0" * 64})
    assert not commits.withdraw_if_lost(config.shards, AttemptName(1, "12345678"), planned, fingerprint)


@pytest.mark.parametrize("last", [False, True])
def test_a_run_whose_folder_is_replaced_by_another_does_not_call_it_finished(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    config = config_of(tiny_model, tmp_path)
    rows = [{**row, "chosen": f"{row['chosen']} Or so."} for row in ROWS]
    data = write_jsonl(tmp_path / "other.jsonl", rows)
    other = config.model_copy(update={"data": [str(data)], "shards": tmp_path / "other"})
    precompute(other, scorer=ScriptedScorer())
    before = {p.relative_to(other.shards) for p in other.shards.rglob("*")}
    written: list[object] = []
    original = commits.write_text

    def replaced(*arguments: object, **settings: object) -> None:
        original(*arguments, **settings)  # type: ignore[arg-type]
        written.append(arguments)
        if len(written) == (3 if last else 2):
            shutil.move(config.shards, tmp_path / "away")
            shutil.move(other.shards, config.shards)

    monkeypatch.setattr(commits, "write_text", replaced)
    with pytest.raises(FingerprintError, match="this run began with 12 rows") as caught:
        precompute(config, scorer=ScriptedScorer())
    assert caught.value.exit_code == 4
    assert before <= {p.relative_to(config.shards) for p in config.shards.rglob("*")}


def test_whoever_may_not_delete_finalizes_all_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(path: AnyPath) -> None:
        if Path(str(path)).parent.name in (COMMITS, DATA, DROPPED):
            raise PermissionError(13, "Permission denied", str(path))
        Path(str(path)).unlink()

    monkeypatch.setattr(commits, "remove", refuses)
    assert finalize(folder) == load_manifest(folder)
    assert len(list((folder / DATA).iterdir())) == 4


def test_a_private_file_whose_name_holds_a_newline_is_garbage(folder: Path) -> None:
    private = folder / DATA / ".00001-ab\ncd.parquet.1234abcd.tmp"
    private.write_text("half")
    assert find_garbage(folder, older_than_hours=0, look_only=True).files == [private]


def test_gc_leaves_the_index_that_a_finalize_may_be_about_to_take(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed finalize left it long ago. The next one finds it whole, and takes it."""
    with monkeypatch.context() as patch:
        patch.setattr(finalize_module, "write_manifest", stop)
        with pytest.raises(Killed):
            finalize(folder)
    assert (folder / INDEX).exists()
    write = finalize_module.write_index

    def beside_gc(*args: object) -> tuple[str, str]:
        found = write(*args)  # type: ignore[arg-type]
        remove_garbage(find_garbage(folder, older_than_hours=0))
        return found

    monkeypatch.setattr(finalize_module, "write_index", beside_gc)
    finalize(folder)
    require_settled(folder)


def test_a_choice_whose_index_is_gone_is_not_published(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(finalize_module, "_overtaken", stop)
        with pytest.raises(Killed):
            finalize(folder)
    (choice,) = folder.glob(".manifest.json.*.tmp")
    # As one that a finalize of the folder before a repair left: it named its index otherwise.
    choice.write_text(choice.read_text().replace(f'"{INDEX}"', '"index-12.parquet"'))
    finalize(folder)
    require_settled(folder)


def stop(*_: object, **__: object) -> None:
    raise Killed
