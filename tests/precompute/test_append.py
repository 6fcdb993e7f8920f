"""A folder grows with its data: only new pairs are scored, and readers never see a folder half grown."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import NUMERICS, ScriptedScorer, column_of, preference_rows, write_jsonl

from dpo_opt.launch import launch
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.run import precompute, work
from dpo_opt.precompute.shards.finalize import finalize
from dpo_opt.precompute.shards.gc import find_garbage, remove_garbage
from dpo_opt.precompute.shards.make_plan import Planned, make_plan
from dpo_opt.precompute.shards.read_plan import read_plan, read_plans
from dpo_opt.precompute.shards.reference import make_tokenizer, resolve_reference
from dpo_opt.precompute.shards.repair import repair
from dpo_opt.precompute.shards.status import status
from dpo_opt.precompute.shards.write_plan import adopt_plan
from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer
from dpo_opt.schemas.errors import DataError, FingerprintError
from dpo_opt.schemas.manifest import INDEX, MANIFEST, PLAN, load_manifest, to_json
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.shards import DroppedRow, write_dropped, write_table
from dpo_opt.schemas.sidecars import WEIGHT, read_column
from dpo_opt.schemas.storage import sha256_file, write_text

Configs = Callable[..., PrecomputeConfig]
ROWS = preference_rows(20)


@pytest.fixture
def config_of(tiny_model: Path, tmp_path: Path) -> Configs:
    def config(rows: int, **settings: Any) -> PrecomputeConfig:
        data = write_jsonl(tmp_path / "data.jsonl", ROWS[:rows])
        values = {"model": str(tiny_model), "data": data, "shards": tmp_path / "shards", "pairs_per_shard": 4}
        return PrecomputeConfig.model_validate(values | settings)

    return config


def content(shards: Any) -> list[tuple[int, str, list[float]]]:
    pairs = ShardFolder.open(shards).pairs()
    return [(p.row, p.pair_id, p.ref_rejected_token_logps.tolist()) for p in pairs]


def test_only_new_pairs_are_scored_and_the_result_is_that_of_one_run(
    config_of: Configs, tmp_path: Path
) -> None:
    first = precompute(config_of(10), scorer=ScriptedScorer())
    scorer = ScriptedScorer()
    second = precompute(config_of(20, append=True), scorer=scorer)
    assert len(scorer.scored) == 2 * 10
    assert second.shards[: len(first.shards)] == first.shards
    # The last shard of the first run stays as short as it is.
    assert [(s.start, s.stop) for s in second.shards] == [
        (0, 4),
        (4, 8),
        (8, 10),
        (10, 14),
        (14, 18),
        (18, 20),
    ]
    whole = precompute(config_of(20, shards=tmp_path / "whole"), scorer=ScriptedScorer())
    assert content(tmp_path / "shards") == content(tmp_path / "whole")
    assert (second.dataset_digest, second.rows, second.kept) == (whole.dataset_digest, 20, 20)
    columns = ["row", "pair_id", "prompt_id", "chosen_length"]
    grown, at_once = (ShardFolder.open(tmp_path / n).index().select(columns) for n in ("shards", "whole"))
    assert grown.equals(at_once)


def test_a_folder_grows_more_than_once_and_the_same_command_goes_on(config_of: Configs) -> None:
    for rows in (5, 6, 13):
        precompute(config_of(rows, append=rows > 5), scorer=ScriptedScorer())
    shards = config_of(13).shards
    assert [plan.rows for plan in read_plans(shards)] == [5, 6, 13]
    assert [p.name for p in sorted(shards.glob("plan*.json"))] == ["plan-1.json", "plan-2.json", "plan.json"]
    again = ScriptedScorer()
    before = {p: p.read_bytes() for p in shards.rglob("*") if p.is_file()}
    for config in (config_of(13), config_of(13, append=True)):
        precompute(config, scorer=again)
    assert again.calls == []
    assert {p: p.read_bytes() for p in shards.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("lost", ["a copy for readers", "repaired"])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"pairs_per_shard": 100}, id="steps within a shard"),
        pytest.param({"pairs_per_shard": 2, "data_share": [0.5]}, id="rows out of the share"),
    ],
)
def test_a_folder_that_lost_its_plans_grows_on(
    config_of: Configs, tmp_path: Path, lost: str, settings: dict[str, Any]
) -> None:
    whole = config_of(4, **settings).shards
    for rows in (4, 8, 12):
        before = precompute(config_of(rows, append=True, **settings), scorer=ScriptedScorer())
    shards = without_plans(whole, tmp_path / "copy") if lost == "a copy for readers" else whole
    if lost == "repaired":
        for plan in shards.glob("plan*.json"):
            plan.unlink()
        assert repair(shards).shards_to_score == []
    other = config_of(16, shards=shards, append=True, **settings | {"pairs_per_shard": 1})
    with pytest.raises(FingerprintError, match="--pairs-per-shard now gives 1"):
        precompute(other, scorer=ScriptedScorer())
    # The same command takes up the plan, and scores nothing.
    again = ScriptedScorer()
    assert precompute(config_of(12, shards=shards, **settings), scorer=again) == before
    assert again.calls == []
    if lost == "a copy for readers":
        (shards / PLAN).unlink()
    manifest = precompute(config_of(16, shards=shards, append=True, **settings), scorer=again)
    assert manifest.shards[: len(before.shards)] == before.shards
    assert len(again.scored) == 2 * (manifest.kept - before.kept) > 0
    assert before.shards[-1].stop == manifest.shards[len(before.shards)].start == 12


@pytest.mark.parametrize("size", [100, 2])
def test_a_folder_that_lost_its_newest_plan_grows_on(config_of: Configs, size: int) -> None:
    shards = config_of(4).shards
    for rows in (4, 7):
        before = precompute(config_of(rows, append=True, pairs_per_shard=size), scorer=ScriptedScorer())
    lost = (shards / "plan-1.json").read_bytes()
    for rows in (7, 12):
        (shards / "plan-1.json").unlink()
        scorer = ScriptedScorer()
        manifest = precompute(config_of(rows, append=True, pairs_per_shard=size), scorer=scorer)
        assert manifest.shards[: len(before.shards)] == before.shards
        assert (len(scorer.scored), manifest.rows) == (2 * (rows - 7), rows)
        assert (shards / "plan-1.json").read_bytes() == lost


def test_a_plan_that_contradicts_the_manifest_is_refused_before_anything_is_written(
    config_of: Configs,
) -> None:
    shards = config_of(4).shards
    for rows in (4, 7):
        precompute(config_of(rows, append=True, pairs_per_shard=100), scorer=ScriptedScorer())
    plan, whole = read_plan(shards), config_of(7, shards=shards.with_name("whole"), pairs_per_shard=100)
    precompute(whole, scorer=ScriptedScorer())
    other = read_plan(whole.shards).shards
    (shards / "plan-1.json").unlink()
    (shards / PLAN).write_text(to_json(plan.model_copy(update={"shards": other})))
    before = {path: path.read_bytes() for path in shards.rglob("*") if path.is_file()}
    scorer = ScriptedScorer()
    for rows in (7, 12):
        with pytest.raises(FingerprintError, match=r"manifest\.json is of 7 rows"):
            precompute(config_of(rows, append=True, pairs_per_shard=100), scorer=scorer)
    assert scorer.calls == []
    assert {path: path.read_bytes() for path in shards.rglob("*") if path.is_file()} == before


def without_plans(shards: Path, copy: Path) -> Path:
    """A folder as a reader needs it."""
    shutil.copytree(shards, copy, ignore=shutil.ignore_patterns("plan*", "commits", "*.yaml"))
    return copy


@pytest.mark.parametrize("size", [3, 5])
def test_a_size_that_would_cut_what_is_scored_is_refused(
    config_of: Configs, tmp_path: Path, size: int
) -> None:
    precompute(config_of(10), scorer=ScriptedScorer())
    copy = without_plans(config_of(10).shards, tmp_path / "copy")
    for shards in (copy, config_of(10).shards):
        with pytest.raises(FingerprintError, match=f"hold 4 rows, --pairs-per-shard now gives {size}"):
            precompute(
                config_of(20, shards=shards, append=True, pairs_per_shard=size), scorer=ScriptedScorer()
            )


def test_a_size_that_cuts_later_shards_is_named_with_the_one_that_does_not(config_of: Configs) -> None:
    """The first shard is shorter than any size, and the data is the same."""
    for rows in (3, 8):
        precompute(config_of(rows, append=True), scorer=ScriptedScorer())
    for rows in (8, 16):
        other = config_of(rows, append=True, pairs_per_shard=5)
        with pytest.raises(FingerprintError, match="hold 4 rows, --pairs-per-shard now gives 5") as caught:
            precompute(other, scorer=ScriptedScorer())
        assert str(caught.value.fix).startswith("pass --pairs-per-shard 4,")
    manifest = precompute(config_of(16, append=True, pairs_per_shard=4), scorer=ScriptedScorer())
    assert manifest.kept == 16


def test_a_size_that_cuts_nothing_that_is_scored_is_taken(config_of: Configs, tmp_path: Path) -> None:
    """And after every change the folder goes on without its plans as with them."""
    shards = config_of(3).shards
    for i, (rows, size) in enumerate([(3, 9), (3, 4), (8, 6), (8, 7), (16, 5), (20, 5)]):
        scorer = ScriptedScorer()
        config = config_of(rows, shards=shards, append=True, pairs_per_shard=size)
        manifest = precompute(config, scorer=scorer)
        shards = without_plans(shards, tmp_path / f"copy-{i}")
    assert [(s.start, s.stop) for s in manifest.shards] == [(0, 3), (3, 8), (8, 13), (13, 16), (16, 20)]
    assert len(scorer.scored) == 2 * 4


def test_growth_is_asked_for(config_of: Configs) -> None:
    precompute(config_of(10), scorer=ScriptedScorer())
    before = (config_of(10).shards / MANIFEST).read_bytes()
    with pytest.raises(FingerprintError, match="grown from 10 to 20 rows") as caught:
        precompute(config_of(20), scorer=ScriptedScorer())
    assert "--append" in str(caught.value.fix)
    assert (config_of(10).shards / MANIFEST).read_bytes() == before


@pytest.mark.parametrize(
    ("change", "match"),
    [
        pytest.param(lambda rows: [ROWS[1], ROWS[0], *rows[2:]], "planned for another run", id="order"),
        pytest.param(lambda rows: [*rows[:3], *rows[4:]], "planned for another run", id="row removed"),
        pytest.param(lambda rows: rows[:4], "planned for another run", id="shorter"),
    ],
)
def test_what_is_no_growth_is_refused(
    config_of: Configs, tmp_path: Path, change: Callable[[list[Any]], list[Any]], match: str
) -> None:
    precompute(config_of(10), scorer=ScriptedScorer())
    config = config_of(20, append=True)
    write_jsonl(tmp_path / "data.jsonl", change(list(ROWS)))
    with pytest.raises(FingerprintError, match=match):
        precompute(config, scorer=ScriptedScorer())


def test_another_model_or_length_cannot_grow_a_folder(config_of: Configs, other_model: Path) -> None:
    precompute(config_of(10), scorer=ScriptedScorer())
    for change, field in (({"model": str(other_model)}, "weights"), ({"max_length": 99}, "max_length")):
        with pytest.raises(FingerprintError, match=field):
            precompute(config_of(20, append=True, **change), scorer=ScriptedScorer())
    with pytest.raises(FingerprintError, match="--pairs-per-shard"):
        precompute(config_of(20, append=True, pairs_per_shard=5), scorer=ScriptedScorer())
    assert len(read_plans(config_of(10).shards)) == 1


def test_readers_follow_the_old_manifest_until_the_new_one_stands(config_of: Configs) -> None:
    precompute(config_of(10), scorer=ScriptedScorer())
    shards = config_of(10).shards
    old = content(shards)

    class Killed(BaseException):
        pass

    def kill(call: int) -> None:
        assert content(shards) == old
        if call == 1:
            raise Killed

    with pytest.raises(Killed):
        precompute(config_of(20, append=True), scorer=ScriptedScorer(before_call=kill))
    assert content(shards) == old
    assert ShardFolder.open(shards).index().num_rows == 10
    found = status(shards)
    assert (found.finalized, found.pairs_total, found.shards_committed) == (False, 20, 4)
    with pytest.raises(DataError, match="2 of 6 shards are not scored yet"):
        finalize(shards)
    # The command that the refusal names needs no --append.
    resumed = ScriptedScorer()
    precompute(config_of(20), scorer=resumed)
    assert len(resumed.calls) == 2
    assert len(content(shards)) == 20
    assert content(shards)[:10] == old


def test_a_run_whose_folder_grows_meanwhile_ends_with_its_own_part(config_of: Configs) -> None:
    def grow(call: int) -> None:
        if call == 1:
            with pytest.raises(KeyboardInterrupt):
                precompute(
                    config_of(20, append=True), scorer=ScriptedScorer(before_call=interrupted_after(1))
                )

    first = precompute(config_of(10), scorer=ScriptedScorer(before_call=grow))
    shards = config_of(10).shards
    assert (first.rows, len(content(shards)), read_plan(shards).rows) == (10, 10, 20)
    with pytest.raises(DataError, match="of 6 shards are not scored yet"):
        finalize(shards)
    assert precompute(config_of(20), scorer=ScriptedScorer()).rows == len(content(shards)) == 20


def test_workers_share_what_is_new(config_of: Configs) -> None:
    precompute(config_of(10), scorer=ScriptedScorer())
    scored = [
        work(config_of(20, append=True, worker_index=i, num_workers=2), scorer=ScriptedScorer())
        for i in (1, 0)
    ]
    assert scored == [3, 0]
    assert finalize(config_of(20).shards).kept == 20


def test_columns_of_the_data_grow_too(config_of: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    weighted = [row | {"weight": i + 1.0} for i, row in enumerate(ROWS)]
    monkeypatch.setitem(globals(), "ROWS", weighted)
    precompute(config_of(10), scorer=ScriptedScorer())
    precompute(config_of(20, append=True), scorer=ScriptedScorer())
    found = column_of(config_of(20).shards, WEIGHT, rows=np.arange(20), default=0.0)
    assert found.tolist() == [i + 1.0 for i in range(20)]


def test_a_manifest_keeps_its_entries_whatever_attempt_comes_later(config_of: Configs) -> None:
    first = precompute(config_of(10), scorer=ScriptedScorer())
    shards = config_of(10).shards
    # A stale attempt finishes after finalize, with a smaller name than the one that counts.
    commit = first.shards[0]
    text = (shards / "commits" / f"00000-{commit.attempt}.json").read_text()
    (shards / "commits" / "00000-00000000.json").write_text(text.replace(commit.attempt, "00000000"))
    (shards / "data" / "00000-00000000.parquet").write_bytes((shards / commit.file).read_bytes())
    (shards / "dropped" / "00000-00000000.parquet").write_bytes((shards / commit.dropped_file).read_bytes())
    second = precompute(config_of(20, append=True), scorer=ScriptedScorer())
    assert second.shards[0] == commit
    assert load_manifest(shards) == second


def test_a_second_reference_is_another_folder_over_the_same_pairs(
    config_of: Configs, tmp_path: Path, other_model: Path
) -> None:
    precompute(config_of(10), scorer=ScriptedScorer())
    other = config_of(10, model=str(other_model), shards=tmp_path / "second")
    precompute(other, scorer=ScriptedScorer(spoil=lambda found: [values - 1 for values in found]))
    first, second = content(tmp_path / "shards"), content(tmp_path / "second")
    assert [pair[:2] for pair in first] == [pair[:2] for pair in second]
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(np.array(a[2]) - 1, b[2], rtol=1e-6)


def test_a_finished_folder_is_not_launched_again(config_of: Configs) -> None:
    config = config_of(10, backend="hf", launcher="slurm", num_workers=2)
    first = launch(config)
    assert len(first["commands"]) == 2
    precompute(config_of(10, backend="hf"), scorer=_hf(config))
    (config.shards / "slurm" / "score.sbatch").unlink()
    again = launch(config)
    assert again["finalized"]
    assert "commands" not in again
    assert not (config.shards / "slurm" / "score.sbatch").exists()
    assert read_plan(config.shards).rows == 10


def _hf(config: PrecomputeConfig) -> Any:
    from dpo_opt.scorers import make_scorer

    return make_scorer(config)


def weigh(monkeypatch: pytest.MonkeyPatch, *weights: float) -> None:
    """Give the data's first rows these weights, and its others none."""
    weighed = [row | {"weight": weight} for row, weight in zip(ROWS, weights, strict=False)]
    rows = preference_rows(len(ROWS))
    monkeypatch.setitem(globals(), "ROWS", [*weighed, *rows[len(weighed) :]])


def weights_of(shards: Path, rows: int) -> list[float]:
    return column_of(shards, WEIGHT, rows=np.arange(rows), default=-1.0).tolist()


def test_weights_of_ones_own_count_instead_of_those_of_the_plan(
    config_of: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    weigh(monkeypatch, *[1.0] * 4)
    precompute(config_of(4), scorer=ScriptedScorer())
    shards, again = config_of(4).shards, ScriptedScorer()
    own = shards / "columns" / "weight.parquet"
    pq.write_table(pa.table({"row": [3, 0], "weight": [5.0, 4.0]}), own)
    precompute(config_of(4), scorer=again)
    assert weights_of(shards, 4) == [4.0, -1.0, -1.0, 5.0]
    own.unlink()
    assert weights_of(shards, 4) == [1.0] * 4
    assert again.calls == []


def test_data_with_other_weights_is_refused_whatever_was_removed(
    config_of: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    weigh(monkeypatch, *[1.0] * 4)
    precompute(config_of(4), scorer=ScriptedScorer())
    (file,) = (config_of(4).shards / "columns").iterdir()
    written, again = file.read_bytes(), ScriptedScorer()
    file.unlink()
    for weights in ([2.0] * 4, []):
        weigh(monkeypatch, *weights)
        with pytest.raises(FingerprintError, match="planned with another weight of its rows") as refused:
            precompute(config_of(4), scorer=again)
        assert f"write other numbers to {file.with_name('weight.parquet')}" in str(refused.value.fix)
        assert not file.exists()
    with pytest.raises(DataError, match="the weight of the pairs is missing"):
        ShardFolder.open(file.parent.parent).has_column(WEIGHT)
    lost = status(file.parent.parent)
    assert not lost.finalized
    assert lost.lost == [f"{file}: the file is missing"]
    assert str(lost.next).startswith("dpo-opt precompute --config")
    # What the message names as the way out.
    weigh(monkeypatch, *[1.0] * 4)
    precompute(config_of(4), scorer=again)
    assert file.read_bytes() == written
    assert status(file.parent.parent).finalized
    assert again.calls == []


def test_numbers_of_a_plan_that_somebody_edited_are_noticed(
    config_of: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    weigh(monkeypatch, *[1.0] * 4)
    precompute(config_of(4), scorer=ScriptedScorer())
    (file,) = (config_of(4).shards / "columns").iterdir()
    pq.write_table(pa.table({"row": [0, 1, 2, 3], "weight": [1.0, 1.0, 1.0, 3.0]}), file)
    with pytest.raises(DataError, match="its values of weight are not those of the plan"):
        weights_of(config_of(4).shards, 4)


def test_a_folder_without_weights_takes_those_of_a_file_of_ones_own(
    config_of: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    precompute(config_of(4), scorer=ScriptedScorer())
    weigh(monkeypatch, 0.0, 1.0, 2.0, 3.0)
    with pytest.raises(FingerprintError, match="another weight") as refused:
        precompute(config_of(4), scorer=ScriptedScorer())
    file = config_of(4).shards / "columns" / "weight.parquet"
    assert f"write other numbers to {file} (columns row and weight)" in str(refused.value.fix)
    file.parent.mkdir()
    pq.write_table(pa.table({"row": [3, 2, 1, 0], "weight": [3, 2, 1, 0]}), file)
    assert weights_of(config_of(4).shards, 5) == [0, 1, 2, 3, -1]


def test_rows_keep_their_weights_when_a_folder_grows(
    config_of: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    weigh(monkeypatch, *range(4))
    precompute(config_of(4), scorer=ScriptedScorer())
    for others in ([0, 1, 2, 9, 4, 5], []):
        weigh(monkeypatch, *others)
        with pytest.raises(FingerprintError, match="planned with another weight of its rows"):
            precompute(config_of(6, append=True), scorer=ScriptedScorer())
    weigh(monkeypatch, *range(6))
    precompute(config_of(6, append=True), scorer=ScriptedScorer())
    assert weights_of(config_of(6).shards, 6) == list(range(6))


def test_a_folder_from_before_plans_named_columns_keeps_them_and_grows(
    config_of: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "ROWS", [row | {"weight": i} for i, row in enumerate(ROWS)])
    precompute(config_of(4), scorer=ScriptedScorer())
    shards = config_of(4).shards
    (file,) = (shards / "columns").iterdir()
    # An early version left in it what a killed run would have added.
    values = [*map(float, range(4)), 9.0, 9.0]
    pq.write_table(pa.table({"row": list(range(6)), "weight": values}), shards / "columns" / "weight.parquet")
    file.unlink()
    for name in (PLAN, MANIFEST):
        record = json.loads((shards / name).read_text())
        del record["columns"]
        if name == MANIFEST:
            del record["sha256"]
            body = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            record["sha256"] = hashlib.sha256(body.encode()).hexdigest()
        (shards / name).write_text(json.dumps(record))
    again = ScriptedScorer()
    precompute(config_of(4), scorer=again)
    assert (again.calls, [p.name for p in (shards / "columns").iterdir()]) == ([], ["weight.parquet"])
    assert column_of(shards, WEIGHT, rows=np.arange(4), default=-1.0).tolist() == [0, 1, 2, 3]
    precompute(config_of(8, append=True), scorer=again)
    assert column_of(shards, WEIGHT, rows=np.arange(8), default=-1.0).tolist() == list(range(8))


@pytest.mark.parametrize("first", [0, 10])
def test_of_different_plans_made_at_once_one_stands(
    config_of: Configs, tmp_path: Path, tiny_model: Path, first: int
) -> None:
    """Of different data, planned for the same empty or growing folder."""
    tokenizers = [load_tokenizer(tiny_model).save_pretrained for _ in range(6)]
    for attempt in range(4):
        folder = tmp_path / f"shards-{attempt}"
        if first:
            precompute(config_of(first, shards=folder), scorer=ScriptedScorer())
        rows = [[*ROWS[:first], *({**row, "weight": i + 1.0} for row in ROWS[i:15])] for i in range(1, 7)]
        made = []
        for i, some in enumerate(rows):
            data = write_jsonl(tmp_path / f"data-{i}.jsonl", some)
            config = config_of(first, shards=folder, append=True).model_copy(update={"data": [str(data)]})
            reference = resolve_reference(config)
            tokenizer = make_tokenizer(config, reference)
            made.append(
                (config, make_plan(config, reference=reference, tokenizer=tokenizer, numerics=NUMERICS))
            )

        def adopt(one: tuple[PrecomputeConfig, Planned], tokenizer: Any) -> str:
            try:
                adopt_plan(*one, tokenizer)
            except FingerprintError as error:
                return str(error.fix)
            return "adopted"

        with ThreadPoolExecutor(len(made)) as pool:
            outcomes = list(pool.map(adopt, made, tokenizers))
        assert outcomes.count("adopted") == 1
        assert all("run the same command again" in fix for fix in outcomes if fix != "adopted")
        winner = made[outcomes.index("adopted")][1]
        assert read_plan(folder) == winner.plan
        # Whoever loses before the plan stands leaves nothing of its own beside it.
        rows = np.arange(first, winner.plan.rows)
        weights = read_column(folder, WEIGHT, files=winner.plan.columns, rows=rows, default=0.0)
        assert weights is not None
        assert set(weights.tolist()) == {outcomes.index("adopted") + 2.0}


def test_a_plan_is_never_replaced_by_one_that_was_made_from_other_data(
    config_of: Configs, tmp_path: Path, tiny_model: Path
) -> None:
    folder = config_of(1).shards

    def planned(rows: int, weight: float) -> tuple[PrecomputeConfig, Planned]:
        config = config_of(rows)
        write_jsonl(tmp_path / "data.jsonl", [row | {"weight": weight} for row in ROWS[:rows]])
        reference = resolve_reference(config)
        tokenizer = make_tokenizer(config, reference)
        return config, make_plan(config, reference=reference, tokenizer=tokenizer, numerics=NUMERICS)

    first, second = planned(8, 1.0), planned(9, 2.0)

    def slow(path: Path) -> None:
        """Another planner comes and goes while this one is at it."""
        load_tokenizer(tiny_model).save_pretrained(path)
        with pytest.raises(FingerprintError, match="9 rows"):
            adopt_plan(*first, load_tokenizer(tiny_model).save_pretrained)

    assert adopt_plan(*second, slow) == second[1].plan
    assert read_plan(folder) == second[1].plan


def test_gc_keeps_what_a_growing_folder_has_scored(config_of: Configs) -> None:
    precompute(config_of(10), scorer=ScriptedScorer())

    def kill(call: int) -> None:
        if call == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        precompute(config_of(20, append=True), scorer=ScriptedScorer(before_call=kill))
    shards = config_of(20).shards
    assert find_garbage(shards, older_than_hours=0).files == []
    resumed = ScriptedScorer()
    precompute(config_of(20), scorer=resumed)
    assert len(resumed.calls) == 1


def test_gc_removes_the_index_that_nobody_follows_any_more(config_of: Configs) -> None:
    precompute(config_of(10), scorer=ScriptedScorer())
    shards = config_of(10).shards
    before = ShardFolder.open(shards)
    days_ago = time.time() - 2 * 24 * 3600
    os.utime(shards / INDEX, (days_ago, days_ago))
    precompute(config_of(20, append=True), scorer=ScriptedScorer())
    # Readers that opened the folder before it grew still need it.
    assert find_garbage(shards, older_than_hours=24).files == []
    assert before.index().num_rows == 10
    assert [pair.row for pair in before.pairs()] == list(range(10))
    os.utime(shards / MANIFEST, (days_ago, days_ago))
    garbage = find_garbage(shards, older_than_hours=24)
    assert garbage.files == [shards / INDEX]
    assert garbage.size == (shards / INDEX).stat().st_size
    remove_garbage(garbage)
    assert len(content(shards)) == ShardFolder.open(shards).index().num_rows == 20


def test_an_index_of_other_attempts_is_left_to_whoever_wrote_it(config_of: Configs) -> None:
    first = precompute(config_of(10), scorer=ScriptedScorer())
    shards = config_of(10).shards
    # The second one looked before there was a manifest, and finds an attempt that left a row out.
    (shards / MANIFEST).unlink()
    commit = first.shards[0]
    name, attempt = f"data/00000-{'0' * 8}.parquet", "0" * 8
    table = pq.read_table(shards / commit.file)
    write_table(shards / name, table.slice(1))
    dropped = f"dropped/00000-{attempt}.parquet"
    write_dropped(shards / dropped, [DroppedRow(0, None, "engine_error", "")])
    other = commit.model_copy(
        update={
            "attempt": attempt,
            "file": name,
            "rows": commit.rows - 1,
            "bytes": (shards / name).stat().st_size,
            "sha256": sha256_file(shards / name),
            "dropped_file": dropped,
            "dropped_sha256": sha256_file(shards / dropped),
            "dropped": {"engine_error": 1},
        }
    )
    write_text(shards / "commits" / f"00000-{attempt}.json", to_json(other))
    second = finalize(shards)
    assert ShardFolder.open(shards).index().num_rows == len(content(shards)) == 9
    assert second.index_file != first.index_file
    assert sha256_file(shards / first.index_file) == first.index_sha256


def test_a_finalize_that_is_killed_before_the_manifest_is_done_again(
    config_of: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = precompute(config_of(10), scorer=ScriptedScorer())

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dpo_opt.precompute.shards.finalize.write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            precompute(config_of(20, append=True), scorer=ScriptedScorer())
    shards = config_of(20).shards
    assert load_manifest(shards) == old
    assert len(content(shards)) == 10
    assert finalize(shards).kept == len(content(shards)) == 20


# A chat template that asks for the time --------------------------------------------------------------------

DAYS = ("2026-03-31", "2026-04-01")


@pytest.fixture
def dated(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., PrecomputeConfig]:
    """Settings of a run on one of two days, whose template writes the date before each conversation."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "dated"))
    template = model / "chat_template.jinja"
    template.write_text("{{ strftime_now('%Y-%m-%d') }} " + template.read_text())

    def config(day: str, rows: int = 10, **settings: Any) -> PrecomputeConfig:
        for module in ("templates", "tokenize"):
            monkeypatch.setattr(f"dpo_opt.precompute.tokens.{module}.today", lambda: day)
        messages = [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "chosen": [{"role": "assistant", "content": row["chosen"]}],
                "rejected": [{"role": "assistant", "content": row["rejected"]}],
            }
            for row in ROWS[:rows]
        ]
        data = write_jsonl(tmp_path / "dated.jsonl", messages)
        values = {"model": str(model), "data": data, "shards": tmp_path / "shards", "pairs_per_shard": 4}
        return PrecomputeConfig.model_validate(values | settings)

    return config


def dates(shards: Path, model: str) -> set[str]:
    decode = load_tokenizer(Path(model)).decode
    return {str(decode(pair.prompt_ids)).partition(" ")[0] for pair in ShardFolder.open(shards).pairs()}


def test_a_folder_keeps_the_date_of_its_first_day(dated: Configs, tmp_path: Path) -> None:
    first, config = DAYS[0], dated(DAYS[0])
    with pytest.raises(KeyboardInterrupt):
        precompute(config, scorer=ScriptedScorer(before_call=interrupted_after(1)))
    manifest = precompute(dated(DAYS[1]), scorer=ScriptedScorer())
    assert manifest.fingerprint.template_date == first
    precompute(dated(DAYS[1], 15, append=True), scorer=ScriptedScorer())
    assert dates(config.shards, config.model) == {first}
    ids = content(config.shards)

    precompute(dated(first, 15, shards=tmp_path / "same"), scorer=ScriptedScorer())
    assert content(tmp_path / "same") == ids
    precompute(dated(DAYS[1], 15, shards=tmp_path / "other"), scorer=ScriptedScorer())
    assert dates(tmp_path / "other", config.model) == {DAYS[1]}


def interrupted_after(calls: int) -> Callable[[int], None]:
    def interrupt(finished: int) -> None:
        if finished == calls:
            raise KeyboardInterrupt

    return interrupt


def test_a_worker_that_comes_on_another_day_follows_the_plan(dated: Configs) -> None:
    parts = {"num_workers": 2, "pairs_per_shard": 2}
    with pytest.raises(KeyboardInterrupt):
        work(dated(DAYS[0], worker_index=0, **parts), scorer=ScriptedScorer(before_call=interrupted_after(2)))
    config = dated(DAYS[1], worker_index=1, **parts)
    assert work(config, scorer=ScriptedScorer()) == 3
    finalize(config.shards)
    assert dates(config.shards, config.model) == {DAYS[0]}


@pytest.mark.parametrize("planned_while", ["reading the data", "writing the plan"])
def test_of_two_who_plan_around_midnight_the_first_fixes_the_date(dated: Configs, planned_while: str) -> None:
    made = []
    for day in DAYS:
        config = dated(day)
        reference = resolve_reference(config)
        tokenizer = make_tokenizer(config, reference)
        plan = make_plan(config, reference=reference, tokenizer=tokenizer, numerics=NUMERICS)
        assert plan.plan.fingerprint.template_date == day
        made.append((config, plan, tokenizer.tokenizer.save_pretrained))
    first = made[0]
    if planned_while == "reading the data":
        adopt_plan(*first)
    else:
        first = made[1]
        save = made[1][2]

        def after_the_other(path: Path) -> None:
            save(path)
            adopt_plan(*made[0])

        made[1] = (*made[1][:2], after_the_other)
    assert adopt_plan(*made[1]) == first[1].plan
    assert read_plan(config.shards) == first[1].plan


def test_a_folder_whose_date_nobody_kept_is_not_added_to(dated: Configs) -> None:
    config = dated(DAYS[0])
    precompute(config, scorer=ScriptedScorer())
    path = config.shards / PLAN
    plan = read_plan(config.shards)
    undated = plan.fingerprint.model_copy(update={"template_date": None})
    path.write_text(to_json(plan.model_copy(update={"fingerprint": undated})))
    for worker in ({}, {"worker_index": 0, "num_workers": 2}):
        with pytest.raises(FingerprintError, match=f"template_date +None +{DAYS[0]}"):
            work(dated(DAYS[0], **worker), scorer=ScriptedScorer())
