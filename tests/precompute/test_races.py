"""Runs that begin at once on one folder: one of them is refused, or all mean the same; never a mixture."""

import json
import multiprocessing
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import yaml
from fakes import NUMERICS, ScriptedScorer, column_of, preference_rows, write_jsonl
from planning import Run, race_in_folders, run_of

from dpo_opt.dry_run import plan_precompute
from dpo_opt.folder_notes import folder_notes
from dpo_opt.integrity import integrity_problems
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.run import precompute
from dpo_opt.precompute.shards.gc import find_garbage, remove_garbage
from dpo_opt.precompute.shards.planned_columns import write_columns
from dpo_opt.schemas.config_keys import MODEL_CONFIG
from dpo_opt.schemas.errors import DataError, FingerprintError
from dpo_opt.schemas.manifest import COMMAND, PLAN, TOKENIZER, load_manifest
from dpo_opt.schemas.sidecars import COLUMNS, WEIGHT
from dpo_opt.schemas.storage import sha256_folder

ROWS = preference_rows(12)
OTHER_TEXT = [row | {"chosen": f"{row['chosen']} Or so."} for row in ROWS]


def weighted(rows: list[dict[str, object]], weight: float, **more: object) -> list[dict[str, object]]:
    return [row | {"weight": weight} | more for row in rows]


# What differs between two runs: the rows of each, and whether the second has another model.
RACES = {
    "data and weights": (weighted(ROWS, 1.0), weighted(OTHER_TEXT, 9.0), False),
    "weights alone": (weighted(ROWS, 1.0), weighted(ROWS, 9.0), False),
    "columns": (weighted(ROWS, 1.0), [row | {"margin": 9.0} for row in ROWS], False),
    "more columns": (weighted(ROWS, 1.0), weighted(ROWS, 1.0, margin=9.0), False),
    "no columns": (weighted(ROWS, 1.0), ROWS, False),
    "columns of none": (ROWS, weighted(ROWS, 9.0), False),
    "model": (weighted(ROWS, 1.0), weighted(ROWS, 1.0), True),
    "nothing": (weighted(ROWS, 1.0), weighted(ROWS, 1.0), False),
}


def content(shards: Path) -> tuple[object, ...]:
    """All that belongs to a plan."""
    data = yaml.safe_load((shards / COMMAND).read_text())["data"]
    files = [(shards / name).read_bytes() for name in (PLAN, MODEL_CONFIG)]
    columns = {path.name: path.read_bytes() for path in (shards / COLUMNS).glob("*")}
    return *files, sha256_folder(shards / TOKENIZER), columns, data


Configs = Callable[[str], list[PrecomputeConfig]]


@pytest.fixture
def configs_of(tiny_model: Path, tmp_path: Path) -> Configs:
    def configs(race: str) -> list[PrecomputeConfig]:
        *rows, other_model = RACES[race]
        models = [tiny_model, tiny_model]
        if other_model:
            models[1] = Path(shutil.copytree(tiny_model, tmp_path / "other"))
            (models[1] / "chat_template.jinja").write_text("{{ messages }}")
            config = models[1] / "config.json"
            config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
        return [
            PrecomputeConfig(
                model=str(model),
                data=[str(write_jsonl(tmp_path / f"{'nothing' if race == 'nothing' else i}.jsonl", some))],
                shards=tmp_path / f"alone-{i}",
                pairs_per_shard=4,
            )
            for i, (model, some) in enumerate(zip(models, rows, strict=True))
        ]

    return configs


def alone(runs: list[Run]) -> list[tuple[object, ...]]:
    """What each run makes of a folder of its own."""
    for run in runs:
        assert run.settle(run.config.shards)
    return [content(run.config.shards) for run in runs]


@pytest.fixture
def often_interrupted() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("often_interrupted")
@pytest.mark.parametrize("race", RACES)
def test_of_two_runs_that_begin_at_once_no_mixture_is_left(
    configs_of: Configs, tmp_path: Path, race: str
) -> None:
    runs = [run_of(config) for config in configs_of(race)]
    expected = alone(runs)
    for i in range(10):
        folder, barrier = tmp_path / f"round-{i}", Barrier(2)

        def settle(run: Run, folder: Path = folder, barrier: Barrier = barrier) -> bool:
            barrier.wait()
            return run.settle(folder)

        with ThreadPoolExecutor(2) as pool:
            settled = list(pool.map(settle, runs))
        assert sum(settled) == (2 if race == "nothing" else 1)
        assert content(folder) == expected[settled.index(True)]
        assert {path.name for path in folder.iterdir()} <= {
            *(PLAN, TOKENIZER, COMMAND, MODEL_CONFIG, "columns", "weights.json")
        }


@pytest.mark.slow
@pytest.mark.parametrize("race", ["data and weights", "model"])
def test_fifty_rounds_of_processes(configs_of: Configs, tmp_path: Path, race: str) -> None:
    context = multiprocessing.get_context("spawn")
    configs, rounds = configs_of(race), 50
    folders = [tmp_path / f"round-{i}" for i in range(rounds)]
    barrier, outcomes = context.Barrier(2), context.Queue()
    workers = [context.Process(target=race_in_folders, args=(c, folders, barrier, outcomes)) for c in configs]
    for worker in workers:
        worker.start()
    found = [outcomes.get(timeout=80) for _ in range(2 * rounds)]
    for worker in workers:
        worker.join(20)
    expected = {config.shards.name: content(config.shards) for config in configs}
    winners = {folder: name for name, folder, settled in found if settled}
    assert len(winners) == rounds == sum(settled for *_, settled in found)
    mixed = [f.name for f in folders if content(f) != expected[winners[f.name]]]
    won = [list(winners.values()).count(name) for name in sorted(expected)]
    print(f"{rounds} rounds, {race}: won {won[0]} and {won[1]}, the other refused, {len(mixed)} mixtures")
    assert mixed == []


@pytest.mark.parametrize("race", RACES)
def test_a_run_that_comes_when_the_plan_stands_leaves_nothing_of_its_own(
    configs_of: Configs, tmp_path: Path, race: str
) -> None:
    mine, other = (run_of(config) for config in configs_of(race))
    expected, _ = alone([mine, other])
    folder = tmp_path / "shards"
    for run in (mine, other, mine):
        assert run.settle(folder) == (run is mine or race == "nothing")
        assert content(folder) == expected


class Killed(BaseException):
    """As kill -9 would: nothing is cleaned up that a handler could."""


def killed_after(done: Callable[..., None]) -> Callable[..., None]:
    def kill(*values: object, **named: object) -> None:
        done(*values, **named)
        raise Killed

    return kill


@pytest.mark.parametrize("writer", ["settle_folder", "keep_model_config", "write_columns", "_keep_command"])
def test_a_kill_while_planning_is_healed_by_the_same_command_and_refused_to_another(
    configs_of: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    mine, other = (run_of(config) for config in configs_of("data and weights"))
    expected, _ = alone([mine, other])
    folder = tmp_path / "shards"

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(f"dpo_opt.precompute.shards.write_plan.{writer}", killed)
        with pytest.raises(Killed):
            mine.settle(folder)
    assert not other.settle(folder)
    assert mine.settle(folder)
    assert content(folder) == expected
    assert not other.settle(folder)
    assert content(folder) == expected


def test_a_kill_while_planning_what_was_appended_keeps_the_new_weights(
    configs_of: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    (config, _) = configs_of("weights alone")
    write_jsonl(Path(config.data[0]), weighted(ROWS[:6], 1.0))
    precompute(config, scorer=ScriptedScorer())
    write_jsonl(Path(config.data[0]), weighted(ROWS, 1.0))
    grown = config.model_copy(update={"append": True})
    with monkeypatch.context() as patch:
        patch.setattr("dpo_opt.precompute.shards.write_plan.write_columns", killed_after(write_columns))
        with pytest.raises(Killed):
            precompute(grown, scorer=ScriptedScorer())
    assert precompute(grown, scorer=ScriptedScorer()).kept == 12
    assert len(list((config.shards / COLUMNS).iterdir())) == 2
    column = column_of(config.shards, WEIGHT, rows=np.arange(12), default=0.0)
    assert column.tolist() == [1.0] * 12
    assert not list(config.shards.glob("*.claim"))


@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("race", RACES)
def test_a_dry_run_compares_what_another_run_has_claimed(
    configs_of: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, race: str, grows: bool
) -> None:
    """It is refused as the run would be, and changes nothing."""
    configs = [
        config.model_copy(update={"shards": tmp_path / "shards", "append": grows})
        for config in configs_of(race)
    ]
    if grows:
        first = write_jsonl(tmp_path / "first.jsonl", RACES[race][0][:4])
        precompute(configs[0].model_copy(update={"data": [str(first)]}), scorer=ScriptedScorer())
        # The second has the same rows first, as one that is to grow the folder has.
        write_jsonl(Path(configs[1].data[0]), [*RACES[race][0][:4], *RACES[race][1][4:]])

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        # After the claim, before the plan.
        patch.setattr("dpo_opt.precompute.shards.write_plan.write_columns", killed)
        with pytest.raises(Killed):
            precompute(configs[0], scorer=ScriptedScorer())
    folder = tmp_path / "shards"
    assert (folder / ("plan-1.json.claim" if grows else "plan.json.claim")).is_file()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert plan_precompute(configs[0], NUMERICS)["rows"] == 12
    if race == "nothing":
        assert plan_precompute(configs[1], NUMERICS)["rows"] == 12
        return
    with pytest.raises(FingerprintError) as said:
        plan_precompute(configs[1], NUMERICS)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    with pytest.raises(FingerprintError) as refused:
        precompute(configs[1], scorer=ScriptedScorer())
    assert str(said.value) == str(refused.value)


def test_what_a_killed_run_leaves_is_never_the_weights_of_other_rows(
    configs_of: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies after it wrote its columns. Then other rows are added, of which some have no weight."""
    config, _ = configs_of("weights alone")
    first = weighted(ROWS[:4], 1.0)
    write_jsonl(Path(config.data[0]), first)
    precompute(config, scorer=ScriptedScorer())
    grown = config.model_copy(update={"append": True})
    write_jsonl(Path(config.data[0]), [*first, *weighted(ROWS[4:], 9.0)])
    with monkeypatch.context() as patch:
        patch.setattr("dpo_opt.precompute.shards.write_plan.write_columns", killed_after(write_columns))
        with pytest.raises(Killed):
            precompute(grown, scorer=ScriptedScorer())
    assert integrity_problems(config.shards, load_manifest(config.shards)) == []
    write_jsonl(Path(config.data[0]), [*first, *OTHER_TEXT[4:8], *weighted(OTHER_TEXT[8:], 2.0)])
    with pytest.raises(FingerprintError) as refused:
        precompute(grown, scorer=ScriptedScorer())
    claim = config.shards / "plan-1.json.claim"
    assert f"rm {claim}" in str(refused.value.fix)
    claim.unlink()
    precompute(grown, scorer=ScriptedScorer())
    weights = column_of(config.shards, WEIGHT, rows=np.arange(12), default=0.0)
    assert weights.tolist() == [1.0] * 4 + [0.0] * 4 + [2.0] * 4
    # What the dead one left is named, and gc removes it; what the plans name stays.
    garbage = find_garbage(config.shards, older_than_hours=0)
    (left,) = (path for path in garbage.files if path.parent.name == COLUMNS)
    (note,) = (n for n in folder_notes(config.shards, load_manifest(config.shards)) if left.name in n)
    assert "left by other attempts" in note
    remove_garbage(garbage)
    assert column_of(config.shards, WEIGHT, rows=np.arange(12), default=0.0).tolist() == weights.tolist()


@pytest.mark.parametrize("shards", ["none", "from another row", "twice"])
def test_a_claim_whose_shards_do_not_add_up_says_how_to_go_on(
    configs_of: Configs, tmp_path: Path, shards: str
) -> None:
    config, _ = configs_of("data and weights")
    run = run_of(config)
    assert run.settle(config.shards)
    plan = json.loads((config.shards / PLAN).read_text())
    ranges = plan["shards"]
    plan["shards"] = {"none": [], "from another row": ranges[1:], "twice": [*ranges, ranges[-1]]}[shards]
    claim = tmp_path / "shards" / "plan.json.claim"
    claim.parent.mkdir()
    claim.write_text(json.dumps({"plan": plan}))
    with pytest.raises(DataError) as caught:
        run.settle(claim.parent)
    assert caught.value.fix == f"rm {claim}, then run the same command again"
    claim.unlink()
    assert run.settle(claim.parent)


def test_a_claim_that_cannot_be_read_says_how_to_go_on(configs_of: Configs, tmp_path: Path) -> None:
    config, _ = configs_of("data and weights")
    claim = tmp_path / "shards" / "plan.json.claim"
    claim.parent.mkdir()
    claim.write_text("{")
    with pytest.raises(DataError) as caught:
        run_of(config).settle(claim.parent)
    assert caught.value.fix == f"rm {claim}, then run the same command again"
    claim.unlink()
    assert run_of(config).settle(claim.parent)
