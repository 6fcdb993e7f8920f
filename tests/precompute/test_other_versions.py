"""Folders of an earlier version are read, verified and gone on with; those of a later one are read."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import ScriptedScorer, preference_rows, write_jsonl

from dpo_opt.analysis.load import scan_shards
from dpo_opt.folder_notes import folder_notes
from dpo_opt.integrity import integrity_problems
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.run import precompute
from dpo_opt.precompute.shards.finalize import finalize
from dpo_opt.precompute.shards.gc import find_garbage
from dpo_opt.precompute.shards.repair import repair
from dpo_opt.precompute.shards.status import status
from dpo_opt.schemas.errors import FingerprintError
from dpo_opt.schemas.manifest import COMMITS, DATA, DROPPED, INDEX, MANIFEST, PLAN, load_manifest
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.shards import ADDED_COLUMNS, INDEX_GROUP_ROWS, SHARD_SCHEMA

ROWS: list[dict[str, object]] = [{**row, "id": i} for i, row in enumerate(preference_rows(30))]
ROWS[4]["rejected"] = ROWS[4]["chosen"]
BEFORE = pa.schema([field for field in SHARD_SCHEMA if field.name not in ADDED_COLUMNS])
ADDED_KEYS = ("not_in_share", "host", "worker", "finished", "seconds")

Configs = Callable[..., PrecomputeConfig]


@pytest.fixture
def config_of(tiny_model: Path, tmp_path: Path) -> Configs:
    def config(rows: int = 20, **settings: Any) -> PrecomputeConfig:
        data = write_jsonl(tmp_path / "data.jsonl", ROWS[:rows])
        values = {"model": str(tiny_model), "data": data, "shards": tmp_path / "shards", "pairs_per_shard": 8}
        return PrecomputeConfig.model_validate(values | settings)

    return config


def as_written_before(shards: Path) -> Path:
    """A finished folder byte for byte as it was written before dropped rows had a folder of their own."""
    body = json.loads((shards / MANIFEST).read_text())
    for entry in body["shards"]:
        file, dropped = shards / entry["file"], shards / entry["dropped_file"]
        table = pq.read_table(file).drop_columns(list(ADDED_COLUMNS))
        rewrite(file, table.cast(BEFORE.with_metadata(table.schema.metadata)))
        entry |= {"bytes": file.stat().st_size, "sha256": sha256(file)}
        entry["dropped_file"] = entry["file"].removesuffix(".parquet") + ".dropped.parquet"
        rewrite(shards / entry["dropped_file"], pq.read_table(dropped))
        entry["dropped_sha256"] = sha256(shards / entry["dropped_file"])
        for key in ADDED_KEYS:
            del entry[key]
        record = shards / COMMITS / f"{entry['shard']:05d}-{entry['attempt']}.json"
        write_record(record, entry)
    shutil.rmtree(shards / DROPPED)
    plan = json.loads((shards / PLAN).read_text())
    for record in (plan, body):
        del record["pairs_per_shard"]
    for planned in plan["shards"]:
        del planned["not_in_share"]
    write_record(shards / PLAN, plan)
    rewrite(shards / INDEX, pq.read_table(shards / INDEX), rows=INDEX_GROUP_ROWS)
    write_manifest(shards, {**body, "index_sha256": sha256(shards / INDEX)})
    return shards


def rewrite(path: Path, table: pa.Table, *, rows: int = 128) -> None:
    pq.write_table(
        table,
        path,
        row_group_size=rows,
        compression="zstd",
        write_page_checksum=True,
        write_page_index=True,
    )


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_record(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, sort_keys=True, indent=1, ensure_ascii=False) + "\n")


def write_manifest(shards: Path, body: dict[str, Any]) -> None:
    body = {key: value for key, value in body.items() if key != "sha256"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    write_record(shards / MANIFEST, {**body, "sha256": hashlib.sha256(text.encode()).hexdigest()})


def content(shards: Path) -> list[tuple[object, ...]]:
    return [
        (p.row, p.pair_id, p.source, p.ref_chosen_token_logps.tobytes(), p.ref_rejected_token_logps.tobytes())
        for p in ShardFolder.open(shards).pairs()
    ]


def require_whole(shards: Path, *, kept: int) -> None:
    manifest = load_manifest(shards)
    assert integrity_problems(shards, manifest) == []
    # The index from before the folder grew may stay for those who read that.
    assert [note for note in folder_notes(shards, manifest) if f": {INDEX}" not in note] == []
    assert set(find_garbage(shards, older_than_hours=0).files) <= {shards / INDEX}
    pairs = list(ShardFolder.open(shards).pairs())
    frame = scan_shards(shards).collect()
    assert frame["row"].to_list() == [p.row for p in pairs]
    assert frame["id"].to_list() == [p.id for p in pairs]
    assert frame["ref_chosen_logps"].to_list() == [p.ref_chosen_logps for p in pairs]
    assert len(pairs) == kept == ShardFolder.open(shards).index().num_rows


def test_an_older_folder_is_read_as_it_is(config_of: Configs) -> None:
    shards = config_of().shards
    precompute(config_of(), scorer=ScriptedScorer())
    pairs = content(shards)
    as_written_before(shards)
    require_whole(shards, kept=19)
    assert content(shards) == pairs
    assert status(shards).finalized
    before = {path: path.read_bytes() for path in shards.rglob("*") if path.is_file()}
    manifest = load_manifest(shards)
    assert finalize(shards) == manifest
    scorer = ScriptedScorer()
    assert precompute(config_of(), scorer=scorer) == manifest
    assert not scorer.calls
    assert repair(shards).rebuilt == []
    assert {path: path.read_bytes() for path in shards.rglob("*") if path.is_file()} == before


def test_an_older_folder_that_is_not_finished_is_gone_on_with(config_of: Configs) -> None:
    shards = config_of().shards
    precompute(config_of(), scorer=ScriptedScorer())
    pairs = content(shards)
    as_written_before(shards)
    for name in (MANIFEST, INDEX):
        (shards / name).unlink()
    for folder in (DATA, COMMITS):
        for path in (shards / folder).glob("00001-*"):
            # Left by a worker that was killed before its commit.
            path.rename(path.with_name(path.name.replace(path.name[:14], "00001-0badc0de")))
    next((shards / COMMITS).glob("00001-*")).unlink()
    for name in ("00000-ffffffff.parquet", "00000-ffffffff.dropped.parquet"):
        (shards / DATA / name).write_bytes(b"another attempt's")
    scorer = ScriptedScorer()
    manifest = precompute(config_of(), scorer=scorer)
    assert len(scorer.calls) == 1
    assert [c.dropped_file.partition("/")[0] for c in manifest.shards] == [DATA, DROPPED, DATA]
    require_whole(shards, kept=19)
    assert content(shards) == pairs
    assert {p.id for p in ShardFolder.open(shards).pairs()} == {None, *map(str, range(8, 16))}


def test_an_older_folder_grows(config_of: Configs) -> None:
    shards = config_of().shards
    precompute(config_of(), scorer=ScriptedScorer())
    as_written_before(shards)
    manifest = precompute(config_of(30, append=True), scorer=ScriptedScorer())
    assert [c.dropped_file.partition("/")[0] for c in manifest.shards] == [DATA, DATA, DATA, DROPPED, DROPPED]
    require_whole(shards, kept=29)


def as_written_later(shards: Path, **fingerprint: object) -> Path:
    """A finished folder whose records, tables and fingerprint say more than is known here."""
    body = json.loads((shards / MANIFEST).read_text())
    body["fingerprint"] |= fingerprint
    plan = json.loads((shards / PLAN).read_text())
    write_record(shards / PLAN, {**plan, "fingerprint": body["fingerprint"], "colour": "green"})
    for entry in body["shards"]:
        file = shards / entry["file"]
        table = pq.read_table(file)
        table = table.append_column("colour", pa.array(["green"] * len(table)))
        said = {**table.schema.metadata, b"dpo_opt.fingerprint": json.dumps(body["fingerprint"]).encode()}
        rewrite(file, table.replace_schema_metadata(said))
        entry |= {"bytes": file.stat().st_size, "sha256": sha256(file), "colour": "green"}
        entry["fingerprint"] = body["fingerprint"]
        write_record(shards / COMMITS / f"{entry['shard']:05d}-{entry['attempt']}.json", entry)
    write_manifest(shards, {**body, "colour": "green"})
    return shards


def test_a_later_folder_is_read_and_verified(config_of: Configs) -> None:
    shards = config_of().shards
    precompute(config_of(), scorer=ScriptedScorer())
    pairs = content(shards)
    as_written_later(shards, rotary="other")
    require_whole(shards, kept=19)
    assert content(shards) == pairs
    assert finalize(shards) == load_manifest(shards)


def test_a_later_fingerprint_is_not_added_to(config_of: Configs) -> None:
    shards = config_of().shards
    precompute(config_of(), scorer=ScriptedScorer())
    as_written_later(shards, rotary="other")
    for settings in ({}, {"append": True}, {"worker_index": 0, "num_workers": 1}):
        with pytest.raises(
            FingerprintError, match=r"more than this program understands \(.*rotary"
        ) as caught:
            precompute(config_of(30, **settings), scorer=ScriptedScorer())
        assert caught.value.fix == "pip install --upgrade dpo-opt"


def test_a_later_fingerprint_whose_new_key_says_nothing_is_added_to(config_of: Configs) -> None:
    shards = config_of().shards
    precompute(config_of(), scorer=ScriptedScorer())
    as_written_later(shards, rotary=None)
    before = {path: path.read_bytes() for path in shards.rglob("*") if path.is_file()}
    assert repair(shards).rebuilt == []
    assert {path: path.read_bytes() for path in shards.rglob("*") if path.is_file()} == before
    precompute(config_of(30, append=True), scorer=ScriptedScorer())
    require_whole(shards, kept=29)
