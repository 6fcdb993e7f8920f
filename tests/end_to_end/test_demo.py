"""The demo as a user runs it: it must teach what it says, without wandering off."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.vllm
def test_demo_makes_completions_kinder_within_a_small_kl(tmp_path):
    pytest.importorskip("vaderSentiment", reason="the demo's extra is not installed")
    pytest.importorskip("gguf", reason="the demo's extra is not installed")
    out = tmp_path / "demo"
    done = subprocess.run(
        [sys.executable, "-m", "dpo_opt", "demo", "--output-dir", str(out)],
        capture_output=True, text=True, check=False,
        # As a user's: it is at work when the other tests have ended.
        env={**os.environ, "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    # The accuracy is of 25 held-out pairs: too few to judge the run by.
    before, after, kl, *_ = json.loads((out / "comparison.json").read_text()).values()
    print(done.stdout[-4000:])
    assert after["value"] > before["high"]
    assert after["low"] > before["value"]
    assert 0 < kl["value"] <= 20
    assert "<script" not in (out / "report.html").read_text()
    # Every command it printed is one a reader can repeat.
    commands = [line.split()[2] for line in done.stdout.splitlines() if line.startswith("$ dpo-opt ")]
    assert commands == ["precompute", "train", "score", "kl", "report"]
