"""The notebook runs from its first cell to its last, and what it keeps is what it printed."""

import json
import re
from pathlib import Path

import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"
_MACHINE = re.compile(r"/(home|root|tmp|work|Users)/|\b\d+(\.\d+){3}\b")


def test_the_kept_outputs_are_whole_and_name_no_machine() -> None:
    kept = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    texts = [str(output.get("text") or output.get("data", {}).get("text/plain")) for output in outputs]
    assert not any(_MACHINE.search(text) for text in [*texts, *(cell.source for cell in kept.cells)])
    assert _MACHINE.search("saved in /tmp/x")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_dpo_and_rloo_both_find_the_reward_and_pay_for_it_in_kl(shared_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("nbclient", reason="nbclient is not installed: it runs the notebook")
    pytest.importorskip("vaderSentiment", reason="vaderSentiment is not installed: it is the reward")
    pytest.importorskip("trl", reason="TRL is not installed: it is the baseline")
    from notebook import execute

    execute(tmp_path, shared_data / "models" / "stories260K")
    points = {
        point["policy"]: point
        for point in json.loads((tmp_path / "quickstart-run" / "points.json").read_text())
    }
    reference = points["reference"]
    assert reference["kl"] == 0
    for name in ("dpo-0.05", "dpo-0.5", "rloo", "best of 8"):
        assert points[name]["reward_low"] > reference["reward_high"], name
        assert points[name]["kl_low"] > 0, name
    assert points["dpo-0.05"]["kl"] > points["dpo-0.5"]["kl"]
