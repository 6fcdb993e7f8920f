import re

import polars as pl
import pytest

from dpo_opt.analysis.load import (
    join_reference,
    scan_kl_samples,
    scan_pair_logps,
    scan_run,
    scan_shards,
)
from dpo_opt.analysis.rewards import margin
from dpo_opt.analysis.slices import shard_slices
from dpo_opt.schemas.errors import ConfigError, DataError
from dpo_opt.schemas.manifest import load_manifest, write_manifest
from dpo_opt.schemas.pair_logps import write_pair_logps
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.shards import SHARD_SCHEMA


@pytest.fixture
def folder(tmp_path, shards_writer, texts):
    shards_writer(tmp_path / "shards", texts(50, prompts=20), pairs_per_shard=20)
    return tmp_path / "shards"


@pytest.fixture
def pairs(folder):
    return list(ShardFolder.open(folder).pairs())


def scored(fake_policy, pairs, rows=None):
    rows = [p.row for p in pairs] if rows is None else rows
    return fake_policy(pairs).rows(rows, step=10, steps=10, phase="score")


def test_frame_holds_what_the_contracts_own_reader_reads(folder, pairs):
    frame = scan_shards(folder).collect()
    assert frame.columns == SHARD_SCHEMA.names
    assert frame["row"].to_list() == [p.row for p in pairs]
    assert frame["pair_id"].to_list() == [p.pair_id for p in pairs]
    assert frame["chosen_ids"].to_list() == [p.chosen_ids.tolist() for p in pairs]
    assert frame["ref_rejected_logps"].to_list() == pytest.approx([p.ref_rejected_logps for p in pairs])


def test_files_that_the_manifest_does_not_name_are_not_read(folder):
    (folder / "data" / "00000-b.parquet").write_bytes((folder / "data" / "00000-a.parquet").read_bytes())
    assert len(scan_shards(folder).collect()) == 50


def test_a_flipped_byte_is_refused_before_any_number_is_read(folder):
    file = folder / "data" / "00001-a.parquet"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    scan_shards(folder)
    file.write_bytes(damaged)
    with pytest.raises(DataError, match="bytes changed"):
        scan_shards(folder)


def test_a_missing_shard_is_refused(folder):
    (folder / "data" / "00001-a.parquet").unlink()
    with pytest.raises(DataError, match="missing"):
        scan_shards(folder)


def test_slices_are_the_whole_and_claim_every_row(folder, monkeypatch):
    monkeypatch.setattr("dpo_opt.analysis.slices._SLICE_ROWS", 20)
    slices = shard_slices(folder)
    assert len(slices) == 3
    assert pl.concat([s.shards for s in slices]).collect().equals(scan_shards(folder).collect())
    rows = pl.DataFrame({"row": [-5, 0, 19, 20, 39, 40, 49, 10**9]})
    assert [rows.filter(s.rows)["row"].to_list() for s in slices] == [[-5, 0, 19], [20, 39], [40, 49, 10**9]]


def test_a_file_a_folder_and_a_run_folder_are_the_same_table(tmp_path, pairs, fake_policy):
    rows = scored(fake_policy, pairs)
    run = tmp_path / "run [1]"
    write_pair_logps(run / "pair_logps" / "00000.parquet", [rows])
    frames = [
        scan_pair_logps(path).collect()
        for path in (run, run / "pair_logps", run / "pair_logps" / "00000.parquet")
    ]
    assert frames[0].equals(frames[1])
    assert frames[1].equals(frames[2])
    assert frames[0]["chosen_logps"].to_list() == [r.chosen_logps for r in rows]


def test_files_still_being_written_are_ignored(tmp_path, pairs, fake_policy):
    write_pair_logps(tmp_path / "00000.parquet", [scored(fake_policy, pairs)])
    (tmp_path / ".00001.parquet.abcd.parquet").write_bytes(b"PAR1 and then the power went")
    assert len(scan_pair_logps(tmp_path).collect()) == 50


def test_something_else_is_refused_by_name(tmp_path, folder):
    (tmp_path / "text.parquet").write_text("not Parquet at all")
    with pytest.raises(DataError, match=re.escape("text.parquet")):
        scan_pair_logps(tmp_path / "text.parquet")
    with pytest.raises(DataError, match="not a table of pair log-probs: it lacks the columns step"):
        scan_pair_logps(folder / "data" / "00000-a.parquet")
    with pytest.raises(DataError, match="not a table of on-policy samples"):
        scan_kl_samples(folder / "data" / "00000-a.parquet")
    with pytest.raises(DataError, match="no Parquet file"):
        scan_pair_logps(tmp_path / "nowhere")


def test_join_puts_each_pair_beside_its_own_reference(tmp_path, folder, pairs, fake_policy):
    rows = scored(fake_policy, pairs)[::-1]
    write_pair_logps(tmp_path / "scores.parquet", [rows])
    joined = join_reference(scan_pair_logps(tmp_path / "scores.parquet"), scan_shards(folder)).collect()
    assert len(joined) == 50
    for row in joined.iter_rows(named=True):
        pair = pairs[row["row"]]
        assert row["pair_id"] == pair.pair_id
        assert row["prompt_id"] == pair.prompt_id
        assert row["chosen_length"] == len(pair.chosen_ids)
        assert row["ref_chosen_logps"] == pytest.approx(pair.ref_chosen_logps)


def test_scores_of_other_pairs_at_the_same_rows_are_refused(
    tmp_path, folder, shards_writer, texts, fake_policy
):
    other = shards_writer(tmp_path / "other", texts(60)[10:])
    write_pair_logps(tmp_path / "scores.parquet", [scored(fake_policy, other)])
    with pytest.raises(DataError, match="another pair at this row"):
        join_reference(scan_pair_logps(tmp_path / "scores.parquet"), scan_shards(folder))


def test_scores_of_rows_that_the_shards_lack_are_refused(tmp_path, folder, shards_writer, texts, fake_policy):
    longer = shards_writer(tmp_path / "longer", texts(60, prompts=20))
    write_pair_logps(tmp_path / "scores.parquet", [scored(fake_policy, longer)])
    with pytest.raises(DataError, match=r"row 5\d is pair .* no such row"):
        join_reference(scan_pair_logps(tmp_path / "scores.parquet"), scan_shards(folder))


def test_a_folder_of_a_later_format_is_refused(folder):
    manifest = load_manifest(folder)
    later = manifest.fingerprint.model_copy(update={"schema_version": 99})
    write_manifest(folder, manifest.model_copy(update={"fingerprint": later}))
    for read in (scan_shards, shard_slices):
        with pytest.raises(DataError, match="format version 99, this program reads up to 2"):
            read(folder)


def test_a_run_is_scanned_beside_its_reference_lazily(tmp_path, folder, pairs, run_writer):
    run = run_writer(tmp_path / "run", folder, pairs)
    for path in (run, str(run), run / "scores" / "final.parquet"):
        found = scan_run(path)
        assert isinstance(found, pl.LazyFrame)
        assert {"chosen_logps", "ref_chosen_logps", "prompt_id", "source"} <= set(found.collect_schema())
    metrics = found.select("row", margin=margin(0.1))
    read, of = zip(*re.findall(r"PROJECT (\d+)/(\d+)", metrics.explain()), strict=True)
    assert max(map(int, read)) <= 4 < min(map(int, of)), "columns are read that the query does not use"
    rewards = metrics.sort("row").collect()
    assert rewards["row"].to_list() == [p.row for p in pairs]
    assert rewards["margin"].is_finite().all()


def test_what_is_no_run_is_not_scanned(tmp_path, folder):
    with pytest.raises(ConfigError, match=r"there is no config\.resolved\.yaml"):
        scan_run(folder)
    with pytest.raises(ConfigError, match="there is no such folder"):
        scan_run(tmp_path / "nothing")
