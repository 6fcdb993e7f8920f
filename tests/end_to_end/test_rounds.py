"""The example of two rounds: reward rises in both, and every file says which model it was."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dpo_opt.schemas.manifest import load_manifest
from dpo_opt.schemas.weights import weights_digest

RUN = Path(__file__).parents[2] / "examples" / "rounds" / "run.sh"


def rounds(model: Path, folder: Path, reference: str) -> list[dict[str, Any]]:
    """Run the example, and read what it measured of the first model and of each round's policy."""
    programs = folder.parent / "bin"
    programs.mkdir(exist_ok=True)
    for name, words in (("python", ""), ("dpo-opt", " -m dpo_opt")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable}{words} "$@"\n')
        (programs / name).chmod(0o755)
    done = subprocess.run(
        ["sh", RUN, model, folder, reference],
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(RUN.parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads((folder / "rounds.json").read_text())
    return found


def reference_of(run: Path) -> tuple[str, bool]:
    """The reference's weights, and whether it is another model than the run began with, by a checkpoint."""
    (state,) = (run / "checkpoints").glob("*/training_state.json")
    data = json.loads(state.read_text())["data"]
    return data["fingerprint"]["weights"], data["reference_differs"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_reward_rises_in_both_rounds_and_each_file_names_its_model(shared_data: Path, tmp_path: Path) -> None:
    pytest.importorskip(
        "vaderSentiment", reason="vaderSentiment is not installed: it is the example's reward"
    )
    model = shared_data / "models" / "stories260K"
    own = tmp_path / "own"
    found = rounds(model, own, "policy")
    # The second reference differs in round 2 alone.
    other = tmp_path / "other"
    shutil.copytree(own / "round-1", other / "round-1")
    (other / "kl").mkdir()
    for name in ("round-0.parquet", "round-1.parquet"):
        shutil.copy(own / "kl" / name, other / "kl" / name)
    held_back = rounds(model, other, "first")

    for policies in (found, held_back):
        for before, after in itertools.pairwise(policies):
            error = (before["standard_error"] ** 2 + after["standard_error"] ** 2) ** 0.5
            assert after["reward"] - before["reward"] > 4 * error
            assert after["kl"] > before["kl"]
    assert found[0]["kl"] == 0
    assert held_back[2]["kl"] < found[2]["kl"]

    first, second = weights_digest(model), weights_digest(own / "round-1" / "run" / "final")
    for folder, reference, differs in ((own, second, False), (other, first, True)):
        settings = json.loads((folder / "round-2" / "samples" / "settings.json").read_text())
        assert settings["weights_sha256"] == second
        assert load_manifest(folder / "round-2" / "shards").fingerprint.weights == reference
        assert reference_of(folder / "round-2" / "run") == (reference, differs)
        card = (folder / "round-2" / "run" / "final" / "README.md").read_text()
        assert reference in card
        assert ("--reference-differs" in card) == differs
