import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dpo_opt.optimize import TrainConfig, loop, train
from dpo_opt.optimize.loop import prepare
from dpo_opt.optimize.optimizer import learning_rate
from dpo_opt.optimize.stream import PairStream
from dpo_opt.schemas.errors import ConfigError, DpoOptError, FingerprintError
from dpo_opt.schemas.manifest import ShardFolder
from dpo_opt.schemas.pair_logps import PAIR_LOGPS_SCHEMA
from dpo_opt.schemas.pairs import ScoredPair, TokenSequence

FullLogps = Callable[[PreTrainedModel, TokenSequence], Tensor]
PAIRS = 28
TRAIN_METRICS = {
    "step", "epoch", "loss", "learning_rate", "grad_norm", "num_tokens", "num_unique_tokens",
    "pairs_per_second", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
    "logps/chosen", "logps/rejected",
}  # fmt: skip
EVAL_METRICS = {"step", "epoch"} | {
    f"eval_{name}" for name in TRAIN_METRICS if name == "loss" or name.startswith(("rewards/", "logps/"))
}


@pytest.fixture
def settings(shards: Path, tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    """A short run on the fp32 shards: 4 steps per epoch, the last of 4 pairs."""
    return {
        "shards": shards,
        "model": str(tiny_model),
        "output_dir": tmp_path / "run",
        "batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
    }


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def train_metrics(run: Path) -> list[dict[str, float]]:
    return [line for line in metrics_of(run) if "loss" in line]


def pair_rows(run: Path, phase: str) -> list[dict[str, Any]]:
    files = sorted((run / "pair_logps").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist() if row["phase"] == phase]


def final_weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "final" / "model.safetensors")


def sums(full_logps: FullLogps, model: PreTrainedModel, pair: ScoredPair) -> tuple[Tensor, Tensor]:
    return (
        full_logps(model, TokenSequence(pair.prompt_ids, pair.chosen_ids)).sum(),
        full_logps(model, TokenSequence(pair.prompt_ids, pair.rejected_ids)).sum(),
    )


def textbook_step(
    full_logps: FullLogps, model: PreTrainedModel, pairs: list[ScoredPair], *, label_smoothing: float
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and clipped gradients of one step from full logits, pair by pair, in float64."""
    model.zero_grad()
    columns: dict[str, list[float]] = {}
    for pair in pairs:
        chosen, rejected = sums(full_logps, model, pair)
        chosen_reward = 0.1 * (chosen - float(pair.ref_chosen_token_logps.astype(np.float64).sum()))
        rejected_reward = 0.1 * (rejected - float(pair.ref_rejected_token_logps.astype(np.float64).sum()))
        odds = torch.sigmoid(chosen_reward - rejected_reward)
        loss = -(1 - label_smoothing) * odds.log() - label_smoothing * (1 - odds).log()
        (loss / len(pairs)).backward()
        values = {
            "loss": loss,
            "rewards/chosen": chosen_reward,
            "rewards/rejected": rejected_reward,
            "rewards/margins": chosen_reward - rejected_reward,
            "rewards/accuracies": (chosen_reward > rejected_reward).double(),
        }
        for name, value in values.items():
            columns.setdefault(name, []).append(value.item())
    grads = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
    means = {name: float(np.mean(column)) for name, column in columns.items()}
    return {**means, "grad_norm": norm}, {n: g / max(1.0, norm) for n, g in grads.items()}


@pytest.fixture
def plain_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGD: Adam and RMSprop turn a gradient that is rounding noise into a step as large as any other."""
    monkeypatch.setattr(loop, "make_optimizer", lambda model, config: torch.optim.SGD(model.parameters()))


@pytest.mark.usefixtures("plain_descent")
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_steps_are_those_of_the_textbook(
    settings: dict[str, Any], full_logps: FullLogps, tiny_model: Path, label_smoothing: float
) -> None:
    settings |= {"learning_rate": 0.5, "label_smoothing": label_smoothing}
    config = TrainConfig(**settings, lr_scheduler_type="constant")
    train(config)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    stream = PairStream(ShardFolder.open(config.shards), eval_split=0.0)
    batches = stream.batches(stream.epoch(seed=config.seed, epoch=0), config.batch_size)
    logged = train_metrics(config.output_dir)
    for line, pairs in zip(logged, batches, strict=True):
        expected, grads = textbook_step(full_logps, model, pairs, label_smoothing=label_smoothing)
        for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert line[name] == pytest.approx(expected[name], abs=1e-4), name
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
        if line["step"] > 1:  # at first every margin is 0 up to rounding
            assert line["rewards/accuracies"] == expected["rewards/accuracies"]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= config.learning_rate * grads[name]
    assert [len(pairs) for pairs in stream.batches(stream.epoch(seed=0, epoch=0), 8)] == [8, 8, 8, 4]
    assert abs(logged[-1]["loss"] - math.log(2)) > 0.01
    assert logged[0]["grad_norm"] > config.max_grad_norm, "clipping was not tested"
    trained = final_weights(config.output_dir)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach(), rtol=0, atol=1e-4)


def test_training_starts_at_ln_2_and_learns_the_training_pairs(settings: dict[str, Any]) -> None:
    train(TrainConfig(**settings, num_train_epochs=6))
    logged = train_metrics(settings["output_dir"])
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert np.mean([line["rewards/accuracies"] for line in logged[-4:]]) > 0.9
    assert np.mean([line["loss"] for line in logged[-4:]]) < 0.5


@pytest.mark.usefixtures("plain_descent")
def test_micro_batches_change_neither_metrics_nor_weights(settings: dict[str, Any], tmp_path: Path) -> None:
    budgets = (1, 90, 4096)  # a forward per pair, a few pairs per forward, one forward
    runs = [tmp_path / f"budget-{budget}" for budget in budgets]
    settings |= {"max_steps": 1, "learning_rate": 0.1}
    for run, budget in zip(runs, budgets, strict=True):
        train(TrainConfig(**{**settings, "output_dir": run, "micro_batch_tokens": budget}))
    first, *others = (train_metrics(run)[0] for run in runs)
    for other in others:
        for name in TRAIN_METRICS - {"pairs_per_second"}:
            assert other[name] == pytest.approx(first[name], rel=1e-5, abs=1e-6), name
    expected, *found = (final_weights(run) for run in runs)
    for weights in found:
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)
