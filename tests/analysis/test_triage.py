import json
import math

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from dpo_opt.analysis import triage as triage_module
from dpo_opt.analysis.triage import KINDS, triage
from dpo_opt.analysis.triage_weights import write_weights
from dpo_opt.cli import main
from dpo_opt.commands import triage as triage_command
from dpo_opt.schemas.errors import ConfigError, DataError
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.sidecars import CHES, CHES_NORMALISED, WEIGHT, Column, column_note, write_column


@pytest.fixture
def folder(tmp_path, shards_writer, texts):
    pairs = texts(60)
    # The second of these shares nearly all its letters with the other side.
    pairs[7] = (
        pairs[7][0],
        "the quick brown fox jumps over the lazy dog",
        "the quick brown fox jumps over a lazy dog",
    )
    return tmp_path / "shards", shards_writer(tmp_path / "shards", pairs, pairs_per_shard=25, masked=True)


def weights(shards):
    rows = np.arange(60)
    return ShardFolder.open(shards).column(WEIGHT, rows=rows, default=1.0)


def test_every_number_is_what_its_name_says(folder):
    shards, made = folder
    found = triage(shards, beta=0.5, suspects=0.2)
    assert found.pairs["row"].to_list() == [pair.row for pair in made]
    for row, pair in zip(found.pairs.iter_rows(named=True), made, strict=True):
        chosen, rejected = pair.ref_chosen_logps, pair.ref_rejected_logps
        counted = len(pair.ref_chosen_token_logps)
        if pair.chosen_mask is not None:
            counted = int(pair.chosen_mask.sum())
        per_token = rejected / len(pair.rejected_ids) - chosen / counted
        a, b = set(pair.chosen_ids.tolist()), set(pair.rejected_ids.tolist())
        assert row["pair_id"] == pair.pair_id
        assert row["reference_margin"] == pytest.approx(chosen - rejected, abs=1e-4)
        assert row["perplexity_difference"] == pytest.approx(per_token, abs=1e-5)
        assert row["token_overlap"] == pytest.approx(2 * len(a & b) / (len(a) + len(b)))
        # What is left of the gradient's weight where the ranking turns, of one half at the start.
        turn = 0.5 * (rejected - chosen)
        assert row["hard_to_flip"] == (1 / (1 + math.exp(turn)) < 0.005)
        assert row["near_identical"] == (row["token_overlap"] >= 0.9)
        assert row["no_information"] == (row["near_identical"] and abs(chosen - rejected) < 0.5)
    assert 0 < found.count("hard_to_flip") < 60
    assert found.pairs["near_identical"][7]


def test_suspects_are_the_highest_share_and_never_rightly_ranked(folder):
    shards, _ = folder
    for share in (0.0, 0.1, 1.0):
        found = triage(shards, suspects=share)
        differences = found.pairs["perplexity_difference"]
        suspect = found.pairs.filter("suspect_label")["perplexity_difference"]
        assert len(suspect) == min(int(share * 60), (differences > 0).sum())
        if len(suspect):
            others = found.pairs.filter(~pl.col("suspect_label"))["perplexity_difference"]
            assert suspect.min() > max(0, others.max())
    assert found.suspect_above is not None


def test_high_ches_is_the_highest_share_of_what_was_computed(folder):
    shards, _ = folder
    without = triage(shards, suspects=0.1)
    assert (without.without_ches, without.count("high_ches")) == (60, 0)
    rows = list(range(0, 60, 2))
    write_column(shards, CHES, Column(rows, [-100.0 * row for row in rows]))
    write_column(shards, CHES_NORMALISED, Column(rows, [-float((row * 7) % 60) for row in rows]))
    found = triage(shards, suspects=0.1)
    assert found.without_ches == 30
    high = found.pairs.filter("high_ches")
    assert len(high) == 6
    assert high["ches_normalised"].min() > found.pairs.filter(~pl.col("high_ches"))["ches_normalised"].max()
    assert found.pairs["ches"][4] == -400.0
    assert found.pairs["ches"][5] is None
    assert not found.pairs["high_ches"][5]


def test_high_ches_weighs_nothing_down_unless_every_pair_has_one(folder):
    shards, _ = folder
    arguments = ["triage", "--shards", str(shards), "--write-weights", "high_ches"]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 2
    assert "of 60 pairs, 60 without a CHES score" in refused.output
    assert "--ches REFERENCE" in refused.output
    assert not (shards / "columns" / "weight.parquet").exists()
    write_column(shards, CHES_NORMALISED, Column(list(range(60)), [float(row) for row in range(60)]))
    taken = CliRunner().invoke(main, [*arguments, "--suspects", "0.1"])
    assert taken.exit_code == 0, taken.output
    assert weights(shards).tolist() == [1.0] * 54 + [0.0] * 6


def test_weights_are_written_over_and_taken_back(folder):
    shards, _ = folder
    found = triage(shards, beta=0.5, suspects=0.2)
    assert weights(shards) is None
    file = write_weights(shards, found, kinds=["suspect_label"], weight=0.25)
    expected = np.where(found.pairs["suspect_label"].to_numpy(), 0.25, 1.0)
    assert weights(shards).tolist() == expected.tolist()
    assert column_note(file) == "dpo-opt triage: suspect_label x 0.25"
    write_weights(shards, found, kinds=["suspect_label", "hard_to_flip"], weight=0.0)
    either = found.pairs.select(pl.col("suspect_label") | pl.col("hard_to_flip")).to_series().to_numpy()
    assert weights(shards).tolist() == np.where(either, 0.0, 1.0).tolist()
    file.unlink()
    assert weights(shards) is None


def test_a_persons_own_weights_are_never_lost(folder):
    shards, _ = folder
    write_column(shards, WEIGHT, Column([3], [2.0]))
    with pytest.raises(ConfigError, match="weights of your own") as refused:
        write_weights(shards, triage(shards), kinds=["suspect_label"], weight=0.0)
    assert "weight.mine.parquet" in refused.value.fix
    assert weights(shards)[3] == 2.0


def test_the_datas_own_weights_still_count(folder):
    from dpo_opt.schemas.manifest import load_manifest, write_manifest
    from dpo_opt.schemas.sidecars import planned_file

    shards, _ = folder
    rows, values = [2, 5], [3.0, 0.5]
    file = planned_file(WEIGHT, rows, values)
    write_column(shards, WEIGHT, Column(rows, values), file=file)
    write_manifest(shards, load_manifest(shards).model_copy(update={"columns": {WEIGHT: file}}))
    found = triage(shards, suspects=0.2)
    for _ in range(2):  # what a first triage wrote is not multiplied again
        write_weights(shards, found, kinds=["suspect_label"], weight=0.5)
        expected = np.ones(60)
        expected[rows] = values
        expected[found.pairs["suspect_label"].to_numpy()] *= 0.5
        assert weights(shards).tolist() == expected.tolist()


def test_the_command_says_what_it_found_and_how_to_go_back(folder, tmp_path):
    shards, _ = folder
    arguments = ["triage", "--shards", str(shards), "--suspects", "0.2", "--write-weights", "suspect_label"]
    shown = CliRunner().invoke(main, [*arguments, "--output", str(tmp_path / "pairs.parquet")])
    assert shown.exit_code == 0, shown.output
    assert f"to go back: rm {shards / 'columns' / 'weight.parquet'}" in shown.stdout
    table = pl.read_parquet(tmp_path / "pairs.parquet")
    counts = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert {kind: int(table[kind].sum()) for kind in KINDS} == {kind: counts[kind] for kind in KINDS}


@pytest.mark.parametrize("option", ["--beta", "--suspects", "--weight"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_what_is_no_finite_number_is_refused(folder, option, value):
    shards, _ = folder
    arguments = ["triage", "--shards", str(shards), "--write-weights", "suspect_label", option, value]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.output
    assert option in result.output
    assert not (shards / "columns" / "weight.parquet").exists()


def test_the_command_offers_the_kinds_there_are():
    assert list(triage_command._KINDS) == list(triage_module.KINDS)


def test_a_folder_without_pairs_is_refused(tmp_path, shards_writer):
    shards_writer(tmp_path / "none", [], dropped={"too_long": 3})
    with pytest.raises(DataError, match="no pair was kept"):
        triage(tmp_path / "none")
