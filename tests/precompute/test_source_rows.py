"""A pair is found in its source: ``row`` is its index there, whatever is left out; ``id`` is the data's."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import ScriptedScorer, column_of, preference_rows, write_jsonl

from dpo_opt.integrity import integrity_problems
from dpo_opt.precompute.config import DataConfig, PrecomputeConfig
from dpo_opt.precompute.read.datasets import read_pairs
from dpo_opt.precompute.run import precompute, work
from dpo_opt.precompute.shards.finalize import finalize
from dpo_opt.precompute.shards.read_plan import read_plan
from dpo_opt.precompute.shards.status import status
from dpo_opt.schemas.errors import DataError, FingerprintError
from dpo_opt.schemas.manifest import PLAN, Manifest, Plan, load_manifest, to_json, write_manifest
from dpo_opt.schemas.pairs import ScoredPair
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.shards import write_shard
from dpo_opt.schemas.sidecars import WEIGHT

Configs = Callable[..., PrecomputeConfig]

ROWS = [{**row, "id": f"r{i}", "weight": i + 1.0} for i, row in enumerate(preference_rows(90))]
ROWS[4]["rejected"] = ROWS[4]["chosen"]


@pytest.fixture
def config_of(tiny_model: Path, tmp_path: Path) -> Configs:
    first = write_jsonl(tmp_path / "first.jsonl", ROWS[:40])
    second = write_jsonl(tmp_path / "second.jsonl", ROWS[40:])

    def config(**settings: Any) -> PrecomputeConfig:
        values = {
            "model": str(tiny_model),
            "data": [str(first), str(second)],
            "data_share": [0.5, 0.3],
            "shards": tmp_path / "shards",
            "pairs_per_shard": 8,
        }
        return PrecomputeConfig.model_validate(values | settings)

    return config


def pairs_of(shards: Path) -> list[ScoredPair]:
    return list(ShardFolder.open(shards).pairs())


def require_rows_of_the_source(manifest: Manifest, shards: Path, *, rows: int) -> None:
    for pair in pairs_of(shards):
        assert pair.id == ROWS[pair.row]["id"]
        assert pair.source == ROWS[pair.row].get("source")
    weights = column_of(shards, WEIGHT, rows=np.array([p.row for p in pairs_of(shards)]), default=-1.0)
    assert weights.tolist() == [p.row + 1.0 for p in pairs_of(shards)]
    assert manifest.rows == manifest.shards[-1].stop == rows
    assert manifest.kept + sum(manifest.dropped.values()) == sum(c.used for c in manifest.shards)
    assert manifest.rows - sum(c.not_in_share for c in manifest.shards) == status(shards).pairs_total
    assert [c.start for c in manifest.shards] == [0, *(c.stop for c in manifest.shards[:-1])]
    assert integrity_problems(shards, manifest) == []


def test_a_share_keeps_the_numbers_of_the_source(config_of: Configs) -> None:
    config = config_of()
    manifest = precompute(config, scorer=ScriptedScorer())
    require_rows_of_the_source(manifest, config.shards, rows=90)
    assert 20 < manifest.kept < 50
    assert [c.used for c in manifest.shards[:-1]] == [8] * (len(manifest.shards) - 1)
    assert all(c.not_in_share for c in manifest.shards[:-1])


def test_workers_read_the_planned_rows_of_a_share(config_of: Configs, tmp_path: Path) -> None:
    alone = precompute(config_of(), scorer=ScriptedScorer())
    shards = tmp_path / "workers"
    work(config_of(shards=shards, worker_index=1, num_workers=3), scorer=ScriptedScorer())
    manifest = finalize(shards)
    require_rows_of_the_source(manifest, shards, rows=90)
    assert [c.rows_digest for c in manifest.shards] == [c.rows_digest for c in alone.shards]


def test_folders_of_other_shares_are_joined_by_row(config_of: Configs, tmp_path: Path) -> None:
    found = {}
    for share in (0.4, 0.8, 1.0):
        config = config_of(data_share=[share, share], shards=tmp_path / str(share))
        precompute(config, scorer=ScriptedScorer())
        found[share] = {pair.row: (pair.pair_id, pair.id) for pair in pairs_of(config.shards)}
    assert found[0.4].items() < found[0.8].items() < found[1.0].items()


def test_a_folder_with_a_share_grows(config_of: Configs, tmp_path: Path) -> None:
    data = tmp_path / "growing.jsonl"
    config = config_of(data=[str(data)], data_share=[0.5], append=True)
    for rows in (30, 55, 90):
        write_jsonl(data, ROWS[:rows])
        manifest = precompute(config, scorer=ScriptedScorer())
        require_rows_of_the_source(manifest, config.shards, rows=rows)
        assert rows in [c.stop for c in manifest.shards]
    assert {30, 55, 90} <= {c.stop for c in manifest.shards}
    # A copy for readers has no plan, and goes on all the same.
    for path in config.shards.glob("plan*.json"):
        path.unlink()
    scorer = ScriptedScorer()
    assert precompute(config, scorer=scorer) == manifest
    assert not scorer.calls


def test_other_rows_around_those_of_the_share_are_noticed(config_of: Configs, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", ROWS)
    settings = {"data": [str(data)], "data_share": [0.3], "worker_index": 0, "num_workers": 1}
    work(config_of(**settings, shards=tmp_path / "first"), scorer=ScriptedScorer())
    kept = {pair.row for pair in read_pairs(DataConfig(data=[str(data)], data_share=[0.3]))}
    left_out = next(row for row in range(10, 80) if row not in kept)
    for rows in ([*ROWS[:left_out], *ROWS[left_out + 1 :]], [{**ROWS[left_out], "chosen": " x"}, *ROWS]):
        shards = tmp_path / f"{len(rows)}"
        scored = shutil.ignore_patterns("data", "dropped", "commits")
        shutil.copytree(tmp_path / "first", shards, ignore=scored)
        write_jsonl(data, rows)
        with pytest.raises(DataError, match="changed while the file was being scored"):
            work(config_of(**settings, shards=shards), scorer=ScriptedScorer())


def test_two_shares_that_take_as_many_rows_are_two_plans(config_of: Configs, tmp_path: Path) -> None:
    """Only the digest tells which rows of a shard are used."""
    data = [
        str(write_jsonl(tmp_path / f"{i}.jsonl", preference_rows(100)[50 * i : 50 * i + 50]))
        for i in range(2)
    ]

    def rows_of(share: list[float]) -> int:
        return len(list(read_pairs(DataConfig(data=data, data_share=share))))

    shares = [0.2 + i / 100 for i in range(60)]
    one, other = next(
        ([a, b], [b, a]) for a in shares for b in shares if a < b - 0.2 and rows_of([a, b]) == rows_of([b, a])
    )
    config = config_of(data=data, data_share=one, pairs_per_shard=100)
    precompute(config, scorer=ScriptedScorer())
    with pytest.raises(FingerprintError, match="planned for another run"):
        precompute(config_of(data=data, data_share=other, pairs_per_shard=100), scorer=ScriptedScorer())


def test_a_lost_row_of_a_share_is_found(config_of: Configs) -> None:
    config = config_of()
    manifest = precompute(config, scorer=ScriptedScorer())
    first = manifest.shards[0]
    (pairs,) = ShardFolder.open(config.shards).row_groups(0)
    write_shard(config.shards / first.file, pairs[1:], fingerprint=manifest.fingerprint, shard=0)
    file = config.shards / first.file
    changed = first.model_copy(
        update={"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    )
    write_manifest(config.shards, manifest.model_copy(update={"shards": [changed, *manifest.shards[1:]]}))
    problems = "\n".join(integrity_problems(config.shards, load_manifest(config.shards)))
    left_out = first.not_in_share
    assert (
        f"{left_out + 1} rows are neither kept nor dropped, and {left_out} are not in the share" in problems
    )


def test_a_folder_that_numbered_the_rows_of_its_share_is_not_added_to(config_of: Configs) -> None:
    config = config_of(data_share=[0.5, 0.5])
    precompute(config, scorer=ScriptedScorer())
    plan = read_plan(config.shards)
    ends = np.cumsum([shard.used for shard in plan.shards]).tolist()
    older = Plan(
        fingerprint=plan.fingerprint,
        dataset_digest="d" * 64,
        rows=plan.used,
        shards=[
            shard.model_copy(update={"start": stop - shard.used, "stop": stop, "not_in_share": 0})
            for shard, stop in zip(plan.shards, ends, strict=True)
        ],
    )
    for path in config.shards.glob("*.json"):
        path.unlink()
    (config.shards / PLAN).write_text(to_json(older))
    with pytest.raises(FingerprintError, match="numbered within --data-share") as caught:
        precompute(config, scorer=ScriptedScorer())
    assert "another --shards folder" in str(caught.value.fix)


# What the data calls a row ---------------------------------------------------------------------------------

IDS = [
    ("a text", "a text"),
    (7, "7"),
    (None, None),
    (True, None),
    (1.5, None),
    (["x"], None),
    ({"of": "x"}, None),
]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_an_id_is_text_or_a_whole_number(tmp_path: Path, suffix: str) -> None:
    for value, expected in IDS:
        row = {"prompt": "p", "chosen": " a", "rejected": " b", "id": value}
        path = tmp_path / f"data.{suffix}"
        if suffix == "jsonl":
            path.write_text(json.dumps(row))
        else:
            pq.write_table(pa.Table.from_pylist([row]), path)
        (pair,) = read_pairs(DataConfig(data=[str(path)]))
        assert pair.id == expected

    path = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "p", "chosen": " a", "rejected": " b", "uid": 5}])
    (pair,) = read_pairs(DataConfig(data=[str(path)], column={"id": "uid"}))
    assert pair.id == "5"


def test_half_a_character_in_an_id_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "p", "chosen": " a", "rejected": " b", "id": "\\ud800"}')
    with pytest.raises(DataError, match='"id" contains half a character'):
        list(read_pairs(DataConfig(data=[str(path)])))


def test_every_pair_of_a_ranked_row_has_its_id(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    ranked = {"prompt": "p", "completions": [" a", " b", " c"], "ranks": [1, 2, 3], "id": 12}
    path.write_text(json.dumps(ranked))
    assert [(p.row, p.id) for p in read_pairs(DataConfig(data=[str(path)]))] == [
        (0, "12"),
        (1, "12"),
        (2, "12"),
    ]


def test_an_id_is_no_part_of_what_was_scored(config_of: Configs, tmp_path: Path) -> None:
    """Else no folder from before ids were carried could grow."""
    data = write_jsonl(tmp_path / "data.jsonl", ROWS[:10])
    config = config_of(data=[str(data)], data_share=[])
    manifest = precompute(config, scorer=ScriptedScorer())
    write_jsonl(data, [{**row, "id": i} for i, row in enumerate(ROWS[:10])])
    assert precompute(config, scorer=ScriptedScorer()) == manifest
