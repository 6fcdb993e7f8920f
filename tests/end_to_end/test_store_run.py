"""From shards in an object store to a report, as from a folder, with the same numbers."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from command_line import result_of
from fakes import preference_rows, write_jsonl
from object_store import serve_s3, using_store


@pytest.mark.filterwarnings("ignore:.*s3fs.*")
def test_a_run_from_a_store_is_that_from_a_folder(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPO_OPT_CACHE", str(tmp_path / "cache"))
    data = write_jsonl(tmp_path / "data.jsonl", preference_rows(24))
    with serve_s3("lab") as url, using_store(url):
        found = []
        for name, shards in (("here", tmp_path / "shards"), ("there", "s3://lab/runs/shards")):
            run = tmp_path / name
            result_of(
                *("precompute", "--model", tiny_model, "--data", data, "--shards", shards),
                *("--backend", "hf", "--pairs-per-shard", 10),
            )
            result_of(
                *("train", "--shards", shards, "--model", tiny_model, "--output-dir", run),
                *("--batch-size", 4, "--max-steps", 3, "--eval-split", 0.5, "--logging-steps", 1),
            )
            scores = run / "scores" / "final.parquet"
            result_of("score", "--shards", shards, "--model", run / "final", "--output", scores)
            assert result_of("verify", "--shards", shards, "--model", tiny_model)["parity"]["ok"]
            result_of("report", run, "--output", run / "report.html")
            summary = json.loads((run / "report.summary.json").read_text())
            metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            found.append(
                (
                    [m.get("loss") for m in metrics],
                    summary["runs"][0]["reference_ranking_accuracy"],
                    pq.read_table(scores)["chosen_logps"].to_pylist(),
                )
            )
            assert (run / "final" / "tokenizer.json").is_file()
        assert found[0] == found[1]
        assert any((tmp_path / "cache").rglob("*.parquet"))
