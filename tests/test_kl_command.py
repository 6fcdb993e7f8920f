"""``dpo-opt kl``: which policies it measures and at which prompts; what is there is not measured again."""

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
import yaml
from command_line import invoke, printed, result_of
from fakes import preference_rows, write_jsonl

from dpo_opt.analysis import report
from dpo_opt.analysis.kl import estimate_kl, kl_of_run
from dpo_opt.analysis.kl_table import KL_TABLE
from dpo_opt.analysis.load import scan_kl_samples, scan_pair_logps
from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.loop import train
from dpo_opt.schemas.kl_samples import KL_SAMPLES_SCHEMA, LATER_COLUMNS, read_kl_record
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.sweep.grid import named_runs, record_runs

SMALL = ("--num-prompts", 6, "--num-samples", 2, "--max-new-tokens", 6, "--backend", "hf")


def measured(*arguments: object) -> list[dict[str, Any]]:
    return list(result_of("kl", *arguments, *SMALL)["kl"])


def refused(code: int, *arguments: object) -> str:
    result = invoke("kl", *arguments, *SMALL)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with ``shards`` and the finished ``run``, which has checkpoints of steps 1 to 3."""
    folder = tmp_path_factory.mktemp("kl")
    data = write_jsonl(folder / "data.jsonl", preference_rows(40))
    printed(
        "precompute", "--model", tiny_model, "--data", data, "--shards", folder / "shards", "--backend", "hf"
    )
    train(TrainConfig(output_dir=folder / "run", **settings(folder, tiny_model)))
    return folder


def settings(folder: Path, model: Path) -> dict[str, Any]:
    return {
        "shards": folder / "shards", "model": str(model), "eval_split": 0.3, "eval_steps": 3, "batch_size": 8,
        "learning_rate": 3e-3, "max_steps": 3, "save_steps": 1, "save_total_limit": 4, "logging_steps": 1,
    }  # fmt: skip


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(base / "run", tmp_path / "run"))


def test_every_checkpoint_of_a_run_is_measured_once_on_prompts_it_held_out(run: Path) -> None:
    found = measured(run)
    assert [Path(entry["model"]).name for entry in found] == ["step-00000001", "step-00000002", "final"]
    assert [entry["step"] for entry in found] == [1, 2, 3]
    assert all(entry["measured"] for entry in found)
    trained_on = scan_pair_logps(run).filter(phase="train").collect()["pair_id"]
    assert len(trained_on)
    for entry in found:
        table = pq.read_table(entry["output"])
        assert Path(entry["output"]).parent == run / "kl"
        assert table.num_rows == 12
        record = read_kl_record(Path(entry["output"]))
        assert record is not None
        assert (record.step, record.temperature, record.engine) == (entry["step"], 1.0, "transformers")
        assert entry["k1_sequence"]["value"] == pytest.approx(
            sum(map(sum, table["policy_token_logps"].to_pylist())) / 12
            - sum(map(sum, table["ref_token_logps"].to_pylist())) / 12,
            abs=1e-5,
        )
    held_out = scan_pair_logps(run).filter(phase="eval").select("row").collect()["row"].to_list()
    shards = ShardFolder.open(Path(yaml.safe_load((run / "config.resolved.yaml").read_text())["shards"]))
    unseen = {pair.prompt_id for pair in shards.pairs() if pair.row in held_out}
    assert set(table["prompt_id"].to_pylist()) <= unseen
    rows = pl.read_parquet(run / KL_TABLE)
    assert rows["step"].to_list() == [1, 2, 3]
    assert rows["rb_sequence"].to_list() == [entry["rb_sequence"]["value"] for entry in found]
    assert rows["rb_sequence_low"].to_list() == [entry["rb_sequence"]["low"] for entry in found]


def test_what_was_measured_is_kept_and_what_is_missing_is_measured(run: Path) -> None:
    before = measured(run)
    written = {file: file.stat().st_mtime_ns for file in (run / "kl").iterdir()}
    again = measured(run)
    assert [entry["measured"] for entry in again] == [False] * 3
    assert {file: file.stat().st_mtime_ns for file in (run / "kl").iterdir()} == written
    (run / "kl" / "step-00000002.parquet").unlink()
    repeated = measured(run)
    assert [entry["measured"] for entry in repeated] == [False, True, False]
    # On a CPU, the same seed samples the same.
    assert [entry["rb_sequence"] for entry in repeated] == [entry["rb_sequence"] for entry in before]
    other = refused(2, run, "--seed", 1)
    assert "seed 0, not 1" in other
    assert "rm " in other
    fix = other[other.index("rm ") :]
    assert all(str(file) in fix for file in written)
    assert {entry.name for entry in (run / "kl").iterdir()} == {file.name for file in written}


def test_a_table_of_the_run_that_a_killed_command_left_out_is_written_later(
    run: Path, tmp_path: Path
) -> None:
    measured("--model", run / "final", "--output", tmp_path / "elsewhere.parquet")
    assert not (run / KL_TABLE).exists()
    measured("--model", run / "final")
    whole = (run / KL_TABLE).read_bytes()
    (run / KL_TABLE).unlink()
    assert [entry["measured"] for entry in measured("--model", run / "final")] == [False]
    assert (run / KL_TABLE).read_bytes() == whole


def test_a_checkpoint_is_known_from_within_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, name in (("checkpoints", "step-00000001"), ("final", ".")):
        monkeypatch.chdir(run / folder)
        (entry,) = measured(name)
        assert Path(entry["output"]).parent == run / "kl"


def test_another_policy_under_the_same_name_is_not_taken_for_measured(run: Path) -> None:
    measured("--model", run / "checkpoints" / "step-00000001")
    shutil.rmtree(run / "checkpoints" / "step-00000001")
    shutil.copytree(run / "checkpoints" / "step-00000002", run / "checkpoints" / "step-00000001")
    assert "policy " in refused(2, "--model", run / "checkpoints" / "step-00000001")


def test_the_report_has_every_measured_checkpoint_in_order(run: Path, tmp_path: Path) -> None:
    found = measured(run)
    summary = report([run], tmp_path / "report.html")
    assert summary.runs[0].kl is not None
    assert (summary.runs[0].kl.file, summary.runs[0].kl.step) == ("final.parquet", 3)
    assert summary.runs[0].kl.rb_sequence is not None
    assert summary.runs[0].kl.rb_sequence.value == found[-1]["rb_sequence"]["value"]
    page = (tmp_path / "report.html").read_text()
    places = [page.index(f"<td>{Path(entry['output']).name}") for entry in found]
    assert places == sorted(places)


def test_what_is_no_checkpoint_is_not_measured(run: Path) -> None:
    shutil.copytree(run / "checkpoints" / "step-00000001", run / "checkpoints" / "step-00000001-keep")
    assert [entry["step"] for entry in measured(run)] == [1, 2, 3]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"global_step": "x", "log_history": []}'])
def test_a_broken_state_of_a_run_is_named(run: Path, text: str) -> None:
    (run / "trainer_state.json").write_text(text)
    assert "trainer_state.json: not the state of a finished run" in refused(3, run)


def test_a_run_that_names_no_model_is_told_so(run: Path) -> None:
    config = run / "config.resolved.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"model": None}))
    assert "names no model" in refused(2, run)


def test_a_home_that_is_nobodys_is_told_so() -> None:
    assert "no user's here" in refused(2, "~no_such_user__/model")


@pytest.mark.parametrize("damage", ["pages", "text"])
def test_the_fix_of_a_broken_table_mends_it(run: Path, damage: str) -> None:
    measured(run)
    table = run / "kl" / "step-00000001.parquet"
    data = table.read_bytes()
    zeros = bytes(len(data) // 2)
    table.write_bytes(b"no table" if damage == "text" else data[:4] + zeros + data[4 + len(zeros) :])
    said = refused(3, run)
    assert str(table) in said
    assert "measure again with `dpo-opt kl`" in said
    table.unlink()
    assert [entry["measured"] for entry in measured(run)] == [True, False, False]


def test_the_last_policy_counts_once_whether_as_checkpoint_or_as_final_model(run: Path) -> None:
    (last,) = measured(run / "checkpoints" / "step-00000003")
    assert Path(last["output"]).name == "step-00000003.parquet"
    assert [kl.file for kl in kl_of_run(run)] == ["step-00000003.parquet"]
    measured(run)
    kept = ["step-00000001.parquet", "step-00000002.parquet", "final.parquet"]
    assert [kl.file for kl in kl_of_run(run)] == kept
    assert pl.read_parquet(run / KL_TABLE)["file"].to_list() == kept


def test_a_policy_that_is_gone_is_measured_as_the_others(run: Path) -> None:
    """Its checkpoint was removed, and only its table says what it was."""
    measured(run / "checkpoints" / "step-00000001")
    shutil.rmtree(run / "checkpoints" / "step-00000001")
    said = invoke("kl", run, *SMALL, "--num-samples", 3)
    assert said.exit_code == 2
    assert "there is another measurement (num_samples 2, not 3)" in said.stderr
    assert f"rm {run / 'kl' / 'step-00000001.parquet'}, then run the same command again" in said.stderr
    assert sorted(file.name for file in (run / "kl").iterdir()) == ["step-00000001.parquet"]
    elsewhere = ("--num-samples", 3, "--output", run / "three.parquet")
    printed("kl", run / "final", *SMALL, *elsewhere)
    assert [entry["step"] for entry in measured(run)] == [2, 3]


def test_a_table_of_another_program_is_refused_before_any_measurement(run: Path) -> None:
    foreign = run / "kl" / "zz.parquet"
    foreign.parent.mkdir()
    pl.DataFrame({"x": [1]}).write_parquet(foreign)
    said = refused(3, run)
    assert f"{foreign}: this is not a table of on-policy samples" in said
    assert list(foreign.parent.iterdir()) == [foreign]
    assert f"fix: mv {foreign} {foreign}.other, then run the same command without it" in said
    foreign.rename(f"{foreign}.other")
    assert len(measured(run)) == 3


def test_one_checkpoint_and_a_sweep(run: Path, base: Path, tiny_model: Path, tmp_path: Path) -> None:
    (one,) = measured(run / "checkpoints" / "step-00000002")
    assert (one["step"], one["reference"]) == (2, str(tiny_model))
    assert sorted(file.name for file in (run / "kl").iterdir()) == ["step-00000002.parquet"]
    (final,) = measured(run / "final")
    assert final["output"] == str(run / "kl" / "final.parquet")
    sweep = tmp_path / "sweep"
    one_step = {**settings(base, tiny_model), "output_dir": sweep}
    runs = named_runs(sweep, [TrainConfig(beta=beta, **one_step) for beta in (0.05, 0.5)])
    record_runs(sweep, runs)
    for of_sweep in runs:
        shutil.copytree(base / "run" / "final", of_sweep.config.output_dir / "final")
        for name in ("config.resolved.yaml", "trainer_state.json"):
            shutil.copy(base / "run" / name, of_sweep.config.output_dir)
    found = measured(sweep)
    assert [Path(entry["output"]).parts[-3:] for entry in found] == [
        (name, "kl", "final.parquet") for name in ("beta=0.05", "beta=0.5")
    ]


def test_an_adapter_is_measured_merged(base: Path, tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    run = tmp_path / "adapter"
    train(TrainConfig(output_dir=run, use_peft=True, **{**settings(base, tiny_model), "max_steps": 1}))
    assert not (run / "final" / "config.json").exists()
    (found,) = measured(run)
    assert found["rb_sequence"]["value"] > 0
    printed("merge", "--model", tiny_model, "--adapter", run / "final", "--output", tmp_path / "merged")
    (merged,) = measured(
        tmp_path / "merged", "--reference", tiny_model, "--prompts", base / "data.jsonl",
        "--output", tmp_path / "merged.parquet",
    )  # fmt: skip
    (again,) = measured(run, "--prompts", base / "data.jsonl", "--output", tmp_path / "again.parquet")
    assert again["rb_sequence"] == merged["rb_sequence"]


def test_what_is_not_known_must_be_given(base: Path, run: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert "no model is named" in refused(2)
    assert "--reference and --prompts and --output are not given" in refused(2, tiny_model)
    assert "--output names one file, and there are 3" in refused(2, run, "--output", tmp_path / "a.parquet")
    config = run / "config.resolved.yaml"
    text = config.read_text()
    config.write_text(text.replace("eval_split: 0.3", "eval_split: 0.0"))
    assert "held out no prompts" in refused(2, run)
    assert len(measured(run, "--prompts", base / "shards")) == 3
    config.write_text(text.replace("reference_differs: false", "reference_differs: true"))
    assert "reference-differs" in refused(2, run)


def test_tables_of_earlier_versions_are_read(run: Path) -> None:
    (entry, *_) = measured("--model", run / "final")
    file = Path(entry["output"])
    whole = pq.read_table(file)
    pq.write_table(whole.drop_columns(list(LATER_COLUMNS)).replace_schema_metadata(None), file)
    estimate = estimate_kl(scan_kl_samples(file))
    assert estimate.k1_sequence.value == entry["k1_sequence"]["value"]
    assert (estimate.rb_sequence, estimate.best) == (None, estimate.k1_sequence)
    assert scan_kl_samples(file).collect_schema().names() == KL_SAMPLES_SCHEMA.names
    assert "an earlier version wrote it" in refused(2, "--model", run / "final")


def test_people_read_what_was_measured(run: Path) -> None:
    said = printed("kl", "--model", run / "final", *SMALL)
    assert "KL per completion" in said
    assert "the end-of-sequence token included" in said


@pytest.mark.vllm
@pytest.mark.slow
def test_what_vllm_samples_has_the_same_kl(
    tiny_model: Path, other_model: Path, base: Path, tmp_path: Path
) -> None:
    def measure(backend: str) -> dict[str, Any]:
        said = printed(
            "kl", tiny_model, "--reference", other_model, "--prompts", base / "data.jsonl",
            "--backend", backend, "--output", tmp_path / f"{backend}.parquet", "--num-prompts", 24,
            "--num-samples", 32, "--max-new-tokens", 12, "--json",
        )  # fmt: skip
        return dict(json.loads(said)["kl"][0])

    own, vllm = measure("hf")["rb_sequence"], measure("vllm")["rb_sequence"]
    record = read_kl_record(tmp_path / "vllm.parquet")
    assert record is not None
    assert record.engine == "vllm"
    # Half an interval is two standard errors; the two measurements have one each.
    assert abs(own["value"] - vllm["value"]) < 2**0.5 * 0.75 * (own["high"] - own["low"])
    assert own["high"] - own["low"] < 0.2 * own["value"]
