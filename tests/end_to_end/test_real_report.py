"""The report of a real run: a trained model on human pairs, and every number once more from its files."""

import gzip
import json
from pathlib import Path

import pytest
from report_numbers import differences, expected_entry

from dpo_opt.analysis import report
from dpo_opt.optimize import TrainConfig, train
from dpo_opt.optimize.score_folder import score_shards
from dpo_opt.optimize.transformers_scorer import HfScorer
from dpo_opt.precompute import PrecomputeConfig, precompute

pytestmark = pytest.mark.slow

PAIRS = 160


def test_every_number_of_a_real_run_is_that_of_other_formulas(shared_data: Path, tmp_path: Path) -> None:
    model = shared_data / "models" / "stories260K"
    lines = gzip.decompress((shared_data / "pairs" / "human_pairs.jsonl.gz").read_bytes()).splitlines()
    data = tmp_path / "pairs.jsonl"
    data.write_bytes(b"\n".join(lines[:: len(lines) // PAIRS]) + b"\n")
    shards, run = tmp_path / "shards", tmp_path / "run"
    settings = PrecomputeConfig(model=str(model), data=data, shards=shards, dtype="float32", max_length=256)
    precompute(settings, scorer=HfScorer(model, dtype="float32"))
    train(
        TrainConfig(
            shards=shards,
            model=str(model),
            output_dir=run,
            batch_size=16,
            num_train_epochs=2,
            learning_rate=2e-4,
            eval_split=0.3,
            eval_steps=4,
            logging_steps=1,
        )
    )
    score_shards(shards, model=str(run / "final"), output=run / "scores" / "final.parquet", dtype="float32")
    report([run], tmp_path / "report.html")
    found = json.loads((tmp_path / "report.summary.json").read_text())["runs"][0]
    parity = json.loads((run / "parity.json").read_text())
    noise = max(parity[name] for name in ("margin_sd", "floor_margin_sd") if name in parity)
    expected = expected_entry(run, shards, beta=0.1, noise=noise)
    assert differences(expected, {name: found[name] for name in expected}) == []
