"""A few steps of training on a CUDA device, from scoring to the saved model."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpo_opt.optimize import TrainConfig, train
from dpo_opt.optimize.transformers_scorer import HfScorer
from dpo_opt.precompute import PrecomputeConfig, precompute

pytestmark = pytest.mark.gpu

WORDS = ["the", "cat", "sat", "and", "then", "it", "ran", "out", "of", "town", "with", "nine", "red", "hats"]


def scored(model: Path, folder: Path, *, dtype: str) -> Path:
    """A folder of 40 scored pairs, some of which begin alike."""
    rng = random.Random(0)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    rows = []
    for i in range(40):
        opening = words(1, 3) if i % 3 == 0 else ""
        rows.append(
            {
                "prompt": f"{words(2, 9)} {i}?",
                "chosen": f" {opening} {words(1, 8)}.",
                "rejected": f" {opening} {words(1, 8)}!",
            }
        )
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = PrecomputeConfig(model=str(model), data=data, shards=folder / "shards", dtype=dtype)
    precompute(config, scorer=HfScorer(model, dtype=dtype))
    return folder / "shards"


@pytest.mark.parametrize(("dtype", "within"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_five_steps_start_at_ln_2_and_learn(
    cuda: torch.device, tiny_model: Path, tmp_path: Path, dtype: str, within: float
) -> None:
    shards = scored(tiny_model, tmp_path, dtype=dtype)
    torch.cuda.reset_peak_memory_stats(cuda)
    result = train(
        TrainConfig(
            shards=shards,
            model=str(tiny_model),
            output_dir=tmp_path / "run",
            batch_size=8,
            max_steps=5,
            logging_steps=1,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            dtype=dtype,
        )
    )
    assert torch.cuda.max_memory_allocated(cuda) > 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
    assert result.steps == len(losses) == 5
    assert losses[0] == pytest.approx(math.log(2), abs=within)
    assert losses[-1] < losses[0] - 0.02
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_model, result.final))
    assert before.keys() == after.keys()
    assert any((before[name].float() - after[name].float()).abs().max() > 1e-4 for name in before)
