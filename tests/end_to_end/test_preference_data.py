"""The example on human-labelled pairs, in its smallest form: what it measures is what its files say."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

RUN = Path(__file__).parents[2] / "examples" / "preference_data" / "run.py"
SMALLEST: dict[str, Any] = {
    "data_share": 0.1,
    "eval_share": 0.2,
    "max_length": 256,
    "train": {"batch_size": 16, "learning_rate": 2e-4, "num_train_epochs": 1, "beta": 0.1},
    "num_prompts": 8,
    "kl_samples": 2,
    "max_new_tokens": 16,
    "temperatures": [1.0],
    "best_of": [2],
    "backend": "hf",
}
JUDGE = """
def longer(prompts, completions):
    return [float(len(text)) for text in completions]
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_win_rates_on_human_pairs_are_what_the_judge_was_shown(shared_data: Path, tmp_path: Path) -> None:
    (tmp_path / "size.yaml").write_text(yaml.safe_dump(SMALLEST))
    (tmp_path / "judge.py").write_text(JUDGE)
    out = tmp_path / "out"
    words = ["--data", shared_data / "pairs" / "hh_harmless_base_test.jsonl.gz", "--output", out]
    words += ["--model", shared_data / "models" / "stories260K", "--size", tmp_path / "size.yaml"]
    command = list(map(str, [sys.executable, RUN, *words]))
    judge = ["--", "--function", f"{tmp_path / 'judge.py'}:longer"]
    environment = {**os.environ, "PYTHONPATH": str(RUN.parents[2])}
    done = subprocess.run([*command, *judge], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((out / "results.json").read_text())
    assert found["held_out"]["kl"]["value"] > 0
    assert 0 < found["held_out"]["reward_accuracy"]["value"] <= 1
    rates = {won["name"]: won for won in found["win_rates"]}
    assert list(rates) == ["reference-1", "policy-1", "best-of-2"]
    chosen = {row["prompt"]: row["chosen"] for row in lines(out / "prompts.jsonl")}
    assert len(chosen) == SMALLEST["num_prompts"]
    for name, won in rates.items():
        wins = []
        for row in written(out / "samples" / name):
            own, other = row["completion"], chosen[json.loads(row["row"])["prompt"]]
            wins.append(0.0 if not own.strip() else (len(own) > len(other)) + 0.5 * (len(own) == len(other)))
        assert won["rate"]["value"] == pytest.approx(sum(wins) / len(chosen))
    # Of the completions of the reference Best-of-N has one for each prompt.
    pool = {row["completion"] for row in written(out / "samples" / "reference-2-each")}
    assert {row["completion"] for row in written(out / "samples" / "best-of-2")} <= pool
    # Another judge only judges anew.
    trained = (out / "run" / "metrics.jsonl").stat().st_mtime_ns
    other = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert other.returncode == 0, other.stderr[-3000:]
    assert (out / "run" / "metrics.jsonl").stat().st_mtime_ns == trained
    assert len(list((out / "judged").iterdir())) == 2
    (tmp_path / "size.yaml").write_text(yaml.safe_dump({**SMALLEST, "num_prompts": 5}))
    other = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert other.returncode == 2
    assert "begun otherwise" in other.stderr


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def written(folder: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    parts = sorted((folder / "data").glob("*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]
