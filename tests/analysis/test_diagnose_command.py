"""``dpo-opt diagnose`` on runs that are whole, unfinished, damaged or none."""

import json
import shutil

import polars as pl
import pytest
from click.testing import CliRunner

from dpo_opt.cli import main


@pytest.fixture
def shards(tmp_path, shards_writer, texts):
    return shards_writer(tmp_path / "shards", texts(200))


@pytest.fixture
def run(tmp_path, shards, run_writer):
    return run_writer(tmp_path / "run", tmp_path / "shards", shards, kl=False)


def said(*words, code=0):
    result = CliRunner().invoke(main, ["diagnose", *map(str, words)])
    assert result.exit_code == code, result.output
    return result.output


def test_what_is_said_in_words_is_what_json_has(run):
    text, found = said(run), json.loads(said(run, "--json"))["runs"]
    assert len(found) == 1
    assert found[0]["run"] == str(run)
    assert found[0]["verdict"] == "healthy"
    assert len(found[0]["checks"]) == 12
    for check in found[0]["checks"]:
        assert check["asked"] in text
    for finding in found[0]["findings"]:
        assert finding["title"] in text
        assert finding["action"] in text


def test_json_has_names_for_its_numbers_and_no_nan(run):
    rows = pl.read_parquet(run / "scores" / "final.parquet")
    rows.with_columns(chosen_logps=pl.col("chosen_logps") - 300).write_parquet(
        run / "scores" / "final.parquet"
    )

    def refuse(constant):
        raise AssertionError(constant)

    (found,) = json.loads(said(run, "--json"), parse_constant=refuse)["runs"]
    measures = [measure for finding in found["findings"] for measure in finding["evidence"]]
    assert measures
    for measure in measures:
        assert set(measure) == {"name", "value", "low", "high", "unit", "limit"}
        assert measure["low"] is None or measure["low"] <= measure["value"] <= measure["high"]
    assert {"row", "pair_id"} == set(found["findings"][0]["pairs"][0])


def test_a_run_that_goes_on_or_crashed_is_judged_as_far_as_it_came(run):
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "scores")
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-20])
    (run / "pair_logps" / ".00002.parquet").write_bytes(b"being written")
    text = said(run)
    assert "the run is not finished" in text
    assert "--resume" in text
    assert "no model is saved yet" in text
    checkpoint = run / "checkpoints" / "step-00000020"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE.json").touch()
    assert f"the saved model was not scored: dpo-opt score --shards {run.parent / 'shards'}" in said(run)


def test_values_that_were_not_finite_are_found_with_their_pairs(run):
    shutil.rmtree(run / "final")
    pairs = [{"row": row, "pair_id": "x", "loss": "nan" if row == 7 else 0.5} for row in range(8)]
    dump = run / "not-finite-step-00000031.jsonl"
    dump.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (found,) = json.loads(said(run, "--json"))["runs"]
    first = found["findings"][0]
    assert first["cause"] == "values_not_finite"
    assert [measure["value"] for measure in first["evidence"]] == [31, 1, 8]
    assert [pair["row"] for pair in first["pairs"]] == [7, *range(7)]
    dump.write_text('{"row": 7}\n')
    assert str(dump) in said(run, code=3)


def test_a_checkpoint_of_another_step_is_not_compared_with_the_last_evaluation(run):
    file = run / "scores" / "final.parquet"
    pl.read_parquet(file).with_columns(step=pl.lit(20, pl.Int64)).write_parquet(file)
    assert "the model that was scored is not that of the last evaluation" in said(run)


def test_a_folder_without_a_run_is_named(tmp_path, shards):
    assert "this is not a folder that training wrote" in said(tmp_path, code=2)
    assert "there is no such folder" in said(tmp_path / "nothing", code=2)


def test_a_run_of_other_shards_is_refused(tmp_path, run, shards_writer, texts):
    shutil.rmtree(tmp_path / "shards")
    others = [(f"{prompt} Other.", chosen, rejected) for prompt, chosen, rejected in texts(200)]
    shards_writer(tmp_path / "shards", others)
    assert "another pair at this row" in said(run, code=3)


def test_shards_that_are_gone_are_named(tmp_path, run, shards):
    shutil.rmtree(tmp_path / "shards")
    assert "were not found" in said(run, code=2)


@pytest.mark.parametrize("column", ["chosen_logps", "phase", "pair_id"])
def test_a_missing_column_is_named(run, column):
    file = run / "pair_logps" / "00000.parquet"
    pl.read_parquet(file).drop(column).write_parquet(file)
    assert f"it lacks the columns {column}" in said(run, code=3)


def test_without_a_reward_column_in_the_metrics_the_pairs_still_speak(run):
    kept = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    bare = [{k: v for k, v in line.items() if k in ("step", "epoch", "loss")} for line in kept]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bare))
    assert "judged by " in said(run)


def test_a_name_that_would_steer_the_terminal_does_not(tmp_path, run, shards_writer, texts, run_writer):
    hostile = "\x1b[31mred\nsource"
    pairs = shards_writer(tmp_path / "other", texts(300), sources=("a", hostile))
    odd = run_writer(tmp_path / "odd", tmp_path / "other", pairs, kl=False, scored=False)
    for file in (odd / "pair_logps").iterdir():
        of_hostile = pl.col("row") % 2 == 1
        table = pl.read_parquet(file)
        flipped = {
            "chosen_logps": pl.when(of_hostile).then(pl.col("chosen_logps") - 60).otherwise("chosen_logps")
        }
        table.with_columns(**flipped).write_parquet(file)
    text = said(odd)
    assert "pulls against the others" in text
    assert "\x1b" not in text
    assert not any(line.startswith("source") for line in text.splitlines())
