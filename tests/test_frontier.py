"""``dpo-opt frontier``: rewards of the samples that KL was measured on, against that KL."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import invoke, result_of
from fakes import preference_rows, write_jsonl

from dpo_opt.analysis import report
from dpo_opt.analysis.frontier import read_frontier
from dpo_opt.analysis.intervals import ratio_interval
from dpo_opt.analysis.kl import kl_of_run
from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.loop import train
from dpo_opt.optimize.transformers_scorer import HfScorer
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import TokenSequence

REWARD = """
def length(prompts, completions):
    return [len(c) + len(p) / 1000 for p, c in zip(prompts, completions)]
"""


def points(*arguments: object) -> list[dict[str, Any]]:
    return list(result_of("frontier", *arguments)["points"])


def refused(code: int, *arguments: object) -> str:
    result = invoke("frontier", *arguments)
    assert result.exit_code == code, result.output
    return str(result.output)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A run with samples of two policies."""
    folder = tmp_path_factory.mktemp("frontier")
    data = write_jsonl(folder / "data.jsonl", preference_rows(40))
    shards = ("--shards", folder / "shards", "--backend", "hf")
    assert invoke("precompute", "--model", tiny_model, "--data", data, *shards).exit_code == 0
    train(
        TrainConfig(
            shards=folder / "shards", model=str(tiny_model), output_dir=folder / "run", eval_split=0.3,
            batch_size=8, learning_rate=3e-3, max_steps=2, save_steps=1, save_total_limit=3, eval_steps=2,
        )
    )  # fmt: skip
    small = ("--num-prompts", 6, "--num-samples", 2, "--max-new-tokens", 6, "--backend", "hf")
    assert invoke("kl", folder / "run", *small).exit_code == 0
    return folder / "run"


@pytest.fixture
def run(measured: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(measured, tmp_path / "run"))


@pytest.fixture
def reward(tmp_path: Path) -> str:
    file = tmp_path / "reward.py"
    file.write_text(REWARD)
    return f"{file}:length"


def expected(run: Path, values: Callable[[dict[str, Any]], float]) -> list[tuple[float, float, float]]:
    """Interval of the mean reward of each table, computed here."""
    found = []
    for kl in kl_of_run(run):
        rows = pq.read_table(run / "kl" / kl.file).to_pylist()
        by_prompt: dict[str, list[float]] = {}
        for row in rows:
            by_prompt.setdefault(row["prompt_id"], []).append(values(row))
        sums = np.array([sum(v) for v in by_prompt.values()])
        counts = np.array([float(len(v)) for v in by_prompt.values()])
        found.append(tuple(ratio_interval(numerators=sums, denominators=counts)))
    return found


def numbers(found: list[dict[str, Any]]) -> list[tuple[float, float, float]]:
    return [tuple(point["reward"].values()) for point in found]


def test_a_function_rates_the_texts_that_kl_was_measured_on(run: Path, reward: str) -> None:
    found = points(run, "--reward-function", reward)
    assert [(point["file"], point["step"]) for point in found] == [
        ("step-00000001.parquet", 1),
        ("final.parquet", 2),
    ]
    truth = expected(run, lambda row: len(row["completion"]) + len(row["prompt"]) / 1000)
    np.testing.assert_allclose(numbers(found), truth)
    for point, kl in zip(found, kl_of_run(run), strict=True):
        assert tuple(point["kl"].values()) == kl.estimate.rb_sequence
        assert (point["beta"], point["loss_type"], point["rated_by"]) == (0.1, "sigmoid", reward)
    assert [point.as_record() for point in read_frontier(run)] == found


def test_completions_of_two_lengths_are_refused_with_commands_that_measure_one(
    run: Path, reward: str
) -> None:
    (run / "kl" / "final.parquet").unlink()
    other = ("--num-prompts", 5, "--num-samples", 3, "--max-new-tokens", 4, "--backend", "hf", "--seed", 7)
    (run / "kl" / "step-00000001.parquet").rename(run / "kept.parquet")
    assert invoke("kl", run, *other).exit_code == 0
    (run / "kept.parquet").rename(run / "kl" / "step-00000001.parquet")
    refused = invoke("frontier", run, "--reward-function", reward)
    assert refused.exit_code == 3
    assert "up to 4 tokens" in refused.stderr
    removal, command = refused.stderr.partition("fix: ")[2].strip().split(", then ")
    for file in shlex.split(removal)[1:]:
        Path(file).unlink()
    again = invoke(*shlex.split(command)[1:])
    assert again.exit_code == 0, again.stderr
    assert len(points(run, "--reward-function", reward)) == 2


def test_a_third_models_implicit_reward_is_its_log_ratio(run: Path, other_model: Path) -> None:
    found = points(run, "--reward-model", other_model)

    def log_ratio(row: dict[str, Any]) -> float:
        sequence = TokenSequence(*(np.array(row[n], np.int32) for n in ("prompt_ids", "completion_ids")))
        (logps,) = HfScorer(other_model, dtype="float32").token_logps([sequence])
        return float(logps.sum()) - sum(row["ref_token_logps"])

    np.testing.assert_allclose(numbers(found), expected(run, log_ratio), atol=1e-4)


def test_a_column_that_a_user_added_is_the_reward(run: Path) -> None:
    for file in (run / "kl").iterdir():
        table = pq.read_table(file)
        rewards = pa.array([float(number) for number in range(len(table))])
        pq.write_table(table.append_column("kindness", rewards), file)
    found = points(run, "--reward-column", "kindness")
    assert [point["reward"]["value"] for point in found] == [5.5, 5.5]
    assert [point["step"] for point in found] == [1, 2]
    assert "no column humour" in refused(3, run, "--reward-column", "humour")
    assert "not numbers" in refused(3, run, "--reward-column", "prompt")
    file = run / "kl" / "final.parquet"
    missing = pa.array([None, *[1.0] * 11])
    pq.write_table(pq.read_table(file).append_column("holes", missing), file)
    other = run / "kl" / "step-00000001.parquet"
    pq.write_table(pq.read_table(other).append_column("holes", pa.array([1.0] * 12)), other)
    assert "no finite number in row 0" in refused(3, run, "--reward-column", "holes")


def test_the_report_draws_all_runs_that_one_reward_rated(run: Path, reward: str, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    figure = tmp_path / "frontier.svg"
    found = points(run, other, "--reward-function", reward, "--output", figure)
    assert "<svg role" in figure.read_text()
    summary = report([run, other], tmp_path / "report.html")
    assert [point for entry in summary.runs for point in entry.frontier] == found
    page = (tmp_path / "report.html").read_text()
    assert page.count("Mean reward against KL, rated by") == 1
    assert "KL from the reference per completion, nats" in page
    shutil.rmtree(other / "kl")
    (other / "frontier.parquet").write_bytes(b"?")
    with pytest.raises(ValueError, match="not a table of a frontier"):
        report([other], tmp_path / "report.html")


def test_runs_of_one_name_have_a_line_each(run: Path, reward: str, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "longer" / "run"))
    figure = tmp_path / "frontier.svg"
    found = points(run, other, run, "--reward-function", reward, "--output", figure)
    names = [f"{tmp_path.name}/run"] * 2 + ["longer/run"] * 2
    assert [point["run"] for point in found] == names
    page = figure.read_text()
    report([run, other], tmp_path / "report.html")
    page += (tmp_path / "report.html").read_text()
    for name in set(names):
        # In the legend of both figures, and where the report has a section of it.
        assert page.count(name) >= 3


BAD_POINTS: dict[str, pl.Expr] = {
    "another type": pl.lit("x").alias("kl"),
    "no value": pl.lit(None, dtype=pl.Float64).alias("reward"),
    "not finite": pl.lit(float("inf")).alias("reward"),
    "no name": pl.lit(None, dtype=pl.String).alias("rated_by"),
    "another kind of number": pl.lit("many").alias("samples"),
}


@pytest.mark.parametrize("bad", [*BAD_POINTS, "a column is missing", "a folder", "text"])
def test_a_broken_table_of_points_is_named_and_measured_again(bad: str, run: Path, reward: str) -> None:
    points(run, "--reward-function", reward)
    file = run / "frontier.parquet"
    table = pl.read_parquet(file)
    if bad == "a folder":
        file.unlink()
        file.mkdir()
    elif bad == "text":
        file.write_text("?")
    elif bad == "a column is missing":
        table.drop("rated_by").write_parquet(file)
    else:
        table.with_columns(BAD_POINTS[bad]).write_parquet(file)
    with pytest.raises(DataError, match="not a table of a frontier") as error:
        read_frontier(run)
    assert error.value.where == str(file)
    assert error.value.why
    assert (error.value.fix or "").startswith(f"mv {file} {file}.other, ")
    file.rename(f"{file}.other")
    points(run, "--reward-function", reward)
    assert len(read_frontier(run)) == 2


@pytest.mark.parametrize("beta", ["1" + "0" * 400, "x", ".inf"])
def test_a_beta_that_is_none_is_named(beta: str, run: Path, reward: str) -> None:
    config = run / "config.resolved.yaml"
    config.write_text(f"{config.read_text()}\nbeta: {beta}\n")
    said = refused(2, run, "--reward-function", reward)
    assert f"{config}: beta is " in said
    assert "write the beta there" in said
    assert len(said) < 500 + 2 * len(str(config))


def test_rewards_whose_mean_is_beyond_all_numbers_are_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(
        "def huge(prompts, completions):\n    return [1e308] * len(prompts)\n"
    )
    assert "too large to be averaged" in refused(
        3, run, "--reward-function", f"{tmp_path / 'reward.py'}:huge"
    )
    assert not (run / "frontier.parquet").exists()


def test_what_cannot_be_rated_is_refused(run: Path, reward: str, model: Path) -> None:
    assert "no run is named" in refused(2, "--reward-function", reward)
    assert "no reward is named" in refused(2, run)
    both = ("--reward-function", reward, "--reward-column", "a")
    assert "--reward-column and --reward-function are given" in refused(2, run, *both)
    file = run / "kl" / "final.parquet"
    table = pq.read_table(file)
    record = json.loads(table.schema.metadata[b"dpo_opt.kl"])
    changed = {b"dpo_opt.kl": json.dumps({**record, "max_new_tokens": 7}).encode()}
    pq.write_table(table.replace_schema_metadata(changed), file)
    assert "up to 7 tokens" in refused(3, run, "--reward-function", reward)
    pq.write_table(table.drop_columns(["prompt", "completion"]), file)
    assert "an earlier version wrote it" in refused(3, run, "--reward-function", reward)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "tokenizer" in refused(4, run, "--reward-model", model)
    shutil.rmtree(run / "kl")
    assert "dpo-opt kl" in refused(2, run, "--reward-function", reward)
    assert not (run / "frontier.parquet").exists()
