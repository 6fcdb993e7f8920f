"""The sentiment experiment in a very small form: killed, it finds the same; another seed finds another."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / "examples" / "controlled_sentiment"
PPO = os.environ.get("DPO_OPT_PPO_LIBRARY")
SETTINGS: dict[str, Any] = {
    "reward": str(EXAMPLE.parent / "rounds" / "sentiment.py:sentiment"),
    "backend": "hf",
    "train_prompts": 40,
    "prompt_tokens": 12,
    "completions": 4,
    "max_new_tokens": 16,
    "checkpoints": 2,
    "validation": {"prompts": 8, "samples": 2},
    "held_out": {"prompts": 12, "samples": 4},
    "offline": {"steps": 6, "batch_size": 24},
    "reward_model": {"epochs": 1, "batch_size": 24, "learning_rate": 1e-3},
    "ppo": {
        "steps": 4, "batch_size": 40, "mini_batch_size": 40, "ppo_epochs": 1,
        "init_kl_coef": 0.2, "horizon": 128,
    },
    "methods": {
        "dpo": {"knobs": [0.05], "learning_rates": [1e-4, 1e-3]},
        "preferred_ft": {"learning_rates": [1e-4, 3e-4]},
        "unlikelihood": {"knobs": [0.1], "learning_rates": [3e-5, 1e-4]},
        "best_of_n": {"knobs": [2, 4]},
    },
}  # fmt: skip
OF_PPO = {"knobs": [3], "learning_rates": [1e-4, 3e-4]}


@pytest.fixture
def model(shared_data: Path) -> Path:
    """The story model, where the example's own packages are installed."""
    for package, what in (("trl", "it trains the reward model"), ("vaderSentiment", "it is the reward")):
        pytest.importorskip(package, reason=f"{package} is not installed: {what}")
    return shared_data / "models" / "stories260K"


def started(
    folder: Path, model: Path, seeds: list[int], methods: dict[str, Any]
) -> "subprocess.Popen[bytes]":
    file = folder.with_suffix(".yaml")
    text = yaml.safe_dump({**SETTINGS, "seeds": seeds, "methods": {**SETTINGS["methods"], **methods}})
    file.write_text(text, encoding="utf-8")
    words = [
        "--size",
        file,
        "--model",
        model,
        "--output",
        folder,
        *(["--ppo-library", PPO] if methods else []),
    ]
    return subprocess.Popen(
        [sys.executable, str(EXAMPLE / "run.py"), *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=folder.with_suffix(".log").open("ab"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finished(folder: Path, process: "subprocess.Popen[bytes]") -> pl.DataFrame:
    assert process.wait(timeout=900) == 0, folder.with_suffix(".log").read_text(errors="replace")[-3000:]
    return pl.read_parquet(folder / "points.parquet")


def killed(process: "subprocess.Popen[bytes]", at_work: Callable[[], bool]) -> None:
    """End the experiment with all that it started, once something is seen."""
    deadline = time.monotonic() + 600
    while not at_work() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_twice_it_finds_the_same_and_another_seed_does_not(model: Path, tmp_path: Path) -> None:
    whole = finished(tmp_path / "whole", started(tmp_path / "whole", model, [0, 1], {}))
    assert set(whole["method"]) == {"sft", "dpo", "preferred_ft", "unlikelihood", "best_of_n"}
    assert whole.filter(pl.col("method") != "best_of_n", pl.col("step") > 0)["kl"].list.mean().min() > 0  # type: ignore[operator]
    first, second = (whole.filter(pl.col("seed") == seed).drop("seed") for seed in (0, 1))
    assert not first.equals(second)

    folder = tmp_path / "killed"
    at_work = (
        lambda: (folder / "seed-0" / "judged" / "ranked.jsonl").is_file(),
        lambda: any(folder.glob("seed-0/runs/preferred_ft*/checkpoints/step-*")),
    )
    for seen in at_work:
        killed(started(folder, model, [0], {}), seen)
    again = finished(folder, started(folder, model, [0], {}))
    # The learning rates are chosen with the first seed alone.
    assert again.equals(whole.filter(pl.col("seed") == 0))
    assert {"claims.json", "frontier.svg", "results.md"} <= {path.name for path in folder.iterdir()}
    claims = json.loads((folder / "claims.json").read_text())
    assert {claim["verdict"] for claim in claims} <= {"confirmed", "not confirmed", "undecided"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ppo_repeats_and_its_policies_are_measured(model: Path, tmp_path: Path) -> None:
    if PPO is None:
        pytest.skip("DPO_OPT_PPO_LIBRARY names no folder with TRL's PPO (examples/.../ppo-requirements.txt)")
    methods = {"ppo": OF_PPO, "ppo_gt": OF_PPO}
    folder = tmp_path / "killed"
    killed(started(folder, model, [0], methods), lambda: any(folder.glob("seed-0/runs/ppo_knob*")))
    found = finished(folder, started(folder, model, [0], methods))
    whole = finished(tmp_path / "whole", started(tmp_path / "whole", model, [0], methods))
    assert found.equals(whole)
    online = whole.filter(pl.col("method").is_in(["ppo", "ppo_gt"]))
    assert online.select("method", "step").rows() == [("ppo", 2), ("ppo", 4), ("ppo_gt", 2), ("ppo_gt", 4)]
    assert online["kl"].list.mean().min() > 0  # type: ignore[operator]
