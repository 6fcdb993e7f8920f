"""From rows of one completion and a label to a trained policy and its report, by the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from command_line import invoke
from fakes import preference_rows, write_jsonl


def ran(*arguments: object) -> Result:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data, its shards, and a run that was scored and reported on."""
    folder = tmp_path_factory.mktemp("unpaired")
    pairs = write_jsonl(folder / "pairs.jsonl", preference_rows(40))
    ran("convert", pairs, "--to", "unpaired", "--output", folder / "data")
    data, shards = folder / "data" / "train.jsonl", folder / "shards"
    ran("precompute", "--model", tiny_model, "--data", data, "--shards", shards, "--backend", "hf")
    ran("verify", "--shards", shards, "--model", tiny_model)
    settings = ["--loss-type", "kto", "--batch-size", 16, "--learning-rate", 1e-3, "--eval-split", 0.3]
    said = ran("train", "--shards", shards, "--model", tiny_model, "--output-dir", folder / "run", *settings)
    assert "mean log-ratio of mismatched completions" in said.output
    assert "chosen has the higher reward" not in said.output
    scores = folder / "run" / "scores" / "final.parquet"
    scores.parent.mkdir()
    assert (
        "likelier"
        not in ran(
            "score", "--shards", shards, "--model", folder / "run" / "final", "--output", scores
        ).output
    )
    ran("report", folder / "run", "--output", folder / "report.html")
    return folder


def test_the_report_tells_labels_apart_and_compares_no_two_completions(run: Path) -> None:
    summary: dict[str, Any] = json.loads((run / "report.summary.json").read_text())["runs"][0]
    labelled = summary["labelled"]
    assert set(labelled) == {"all", "training", "held-out"}
    assert labelled["all"]["desirable"] == labelled["all"]["undesirable"] == 40
    assert labelled["training"]["separated"] > 0.6
    assert labelled["training"]["mean_desirable_logratio"] > labelled["training"]["mean_undesirable_logratio"]
    alone = ("scored", "held_out", "reference_ranking_accuracy", "rankings", "calibration", "lengths")
    assert [summary[name] for name in alone] == [None] * len(alone)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "80 unpaired rows in its shards" in page
    assert "Before and after, by label" in page
    for heading in ("pair by pair", "Likelihood of chosen and rejected", "<h3>Length</h3>"):
        assert heading not in page


def test_runs_on_unpaired_rows_are_compared_by_what_they_have(run: Path) -> None:
    shutil.copytree(run / "run", run / "again")
    ran("report", run / "run", run / "again", "--output", run / "both.html")
    page = (run / "both.html").read_text(encoding="utf-8")
    table = page.partition("<h2>Comparison</h2>")[2].partition("</table>")[0]
    assert table.count("<tr>") == 3
    assert ">separated, held-out</th>" in table
    assert "ranking accuracy" not in table
    assert "–" not in table
    # Where it goes on beyond a narrow window, its side has a shadow.
    assert "background-attachment: local, local, scroll, scroll" in page


REFUSED = {
    "triage": ["triage", "--shards", "shards"],
    "diagnose": ["diagnose", "run"],
    "check": ["check", "data/train.jsonl", "--shards", "shards"],
    "sigmoid": ["train", "--shards", "shards", "--model", "MODEL", "--output-dir", "other"],
    "pairs of a report": ["report", "run", "--output", "other.html", "--pairs", "other.parquet"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_compares_two_completions_refuses_the_folder(
    name: str, run: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    words = [str(tiny_model) if word == "MODEL" else word for word in REFUSED[name]]
    result = invoke(*words)
    assert result.exit_code == 2, result.output
    assert "fix: " in result.output
    assert not list(run.glob("other*"))


def test_the_data_is_shown_with_one_completion_a_row(run: Path, tiny_model: Path) -> None:
    data = run / "data" / "train.jsonl"
    shown = json.loads(ran("preview", data, "--model", tiny_model, "--pairs", "2", "--json").stdout)
    assert [("chosen" in row, "rejected" in row) for row in shown["pairs"]] == [(True, False), (False, True)]
    assert "40 completions desirable, 40 undesirable" in ran("check", data).output
    found = json.loads(ran("check", data, "--json").stdout)
    assert found["labels"] == {"desirable": 40, "undesirable": 40}
