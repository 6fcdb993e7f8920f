"""A grid of runs on human-labelled pairs: no reference is loaded, kills change nothing, alone is the same."""

import gzip
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import SHARED
from processes import wait_for
from safetensors.torch import load_file

from dpo_opt.optimize import train
from dpo_opt.precompute import PrecomputeConfig, precompute
from dpo_opt.scorers import make_scorer
from dpo_opt.sweep.grid import named_runs, read_grid, record_runs
from dpo_opt.sweep.run_sweep import write_outcomes

MODEL = SHARED / "models" / "stories260K"
PAIRS = SHARED / "pairs" / "human_pairs.jsonl.gz"
SETTINGS = {"batch_size": 16, "learning_rate": 1e-4, "eval_split": 0.1, "logging_steps": 1}
GRID = {"loss_type": ["sigmoid", "ipo", "apo_zero"], "beta": [0.1, 0.5], "seed": [1, 2]}


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Here and in the processes that the test starts."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_sweep_killed_twice_is_the_runs_alone(tmp_path: Path) -> None:
    if not PAIRS.is_file() or not MODEL.is_dir():
        pytest.skip(f"{PAIRS} or {MODEL} is missing")
    scored, policy, shards = tmp_path / "scored", tmp_path / "policy", tmp_path / "shards"
    shutil.copytree(MODEL, scored)
    with gzip.open(PAIRS, "rt") as lines:
        (tmp_path / "pairs.jsonl").write_text(
            "".join(line for line, _ in zip(lines, range(96), strict=False))
        )
    data = PrecomputeConfig.model_validate(
        {"model": str(scored), "data": tmp_path / "pairs.jsonl", "shards": shards, "backend": "hf"}
    )
    precompute(data, scorer=make_scorer(data))
    # No run can load the model that was scored: it is not where any file says that it was.
    shutil.copytree(scored, policy)
    scored.rename(tmp_path / "away")
    grid = tmp_path / "grid.yaml"
    grid.write_text(yaml.safe_dump({**SETTINGS, "grid": GRID}, sort_keys=False))

    killed, alone = tmp_path / "killed", tmp_path / "alone"
    command = [sys.executable, "-m", "dpo_opt", "sweep", "--shards", shards, "--model", policy]
    command += ["--config", grid, "--output-dir", killed]
    for kill_at in (3, 8, None):
        process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
        if kill_at is not None:
            wait_for(lambda at=kill_at: len(list((killed / "runs").glob("*/metrics.jsonl"))) >= at, process)
            process.send_signal(signal.SIGKILL)
        _, said = process.communicate()
        assert process.returncode == (0 if kill_at is None else -signal.SIGKILL), said

    configs = read_grid(grid, {"shards": str(shards), "model": str(policy)}, sweep=alone)
    runs = named_runs(alone, configs)
    record_runs(alone, runs)
    assert len(runs) == 12
    for run in runs:
        train(run.config)
    write_outcomes(alone)
    tables = [pq.read_table(sweep / "sweep.parquet").to_pylist() for sweep in (killed, alone)]
    assert tables[0] == tables[1]
    assert {row["state"] for row in tables[0]} == {"finished"}
    assert len({row["eval_rewards/margins"] for row in tables[0]}) == 12
    for run in runs:
        weights = [load_file(s / "runs" / run.name / "final" / "model.safetensors") for s in (killed, alone)]
        assert all(weights[0][name].equal(weights[1][name]) for name in weights[0]), run.name
        rows = [pq.read_table(s / "runs" / run.name / "pair_logps").to_pylist() for s in (killed, alone)]
        assert rows[0] == rows[1], run.name
