"""Whole training runs on two processes: against one process, interrupted, and resumed on another number."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchrun_training
from processes import torchrun
from training_runs import Interrupter, contents
from transformers import AutoModelForCausalLM

from dpo_opt.optimize import TrainConfig, train
from dpo_opt.schemas.errors import Preempted

STEPS = 6


@pytest.fixture(scope="module")
def runs(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs by name, all ended: of one process, of two, and begun on one number and ended on another."""
    folder = tmp_path_factory.mktemp("runs")

    def named(name: str, **others: Any) -> dict[str, Any]:
        return {**settings, "shards": str(settings["shards"]), "output_dir": str(folder / name), **others}

    train(TrainConfig(**named("one")))
    with pytest.MonkeyPatch.context() as monkeypatch:
        Interrupter(monkeypatch, at=25)
        with pytest.raises(Preempted):
            train(TrainConfig(**named("one then two")))
    program = folder / "runs.json"
    again = {"resume": True}
    whole = {"loss_type": ["bco_pair", "beta_dpo"], "max_steps": 4, "ld_alpha": 0.5, "use_weighting": True}
    adapter = {"use_peft": True, "lora_r": 4, "learning_rate": 0.01}
    program.write_text(
        json.dumps(
            [
                (named("two"), 0, 0),
                # One pair a step: one of the two processes has none.
                (named("single pairs on two", batch_size=1, max_steps=2, eval_steps=None), 0, 0),
                # To the process that does not write; in training, then in an evaluation.
                (named("whole steps on two", **whole), 0, 0),
                (named("two, stopped"), 1, 4),
                (named("two, stopped", **again), 1, 2),
                (named("two, stopped", **again), 0, 0),
                (named("one then two", **again), 0, 0),
                (named("two then one"), 1, 6),
                (named("adapter", **adapter), 0, 0),
                (named("adapter, stopped", **adapter), 1, 4),
                (named("adapter, stopped", **adapter, **again), 0, 0),
            ]
        ),
        encoding="utf-8",
    )
    torchrun(2, torchrun_training.__file__, program)
    train(TrainConfig(**named("single pairs on one", batch_size=1, max_steps=2, eval_steps=None)))
    train(TrainConfig(**named("two then one", **again)))
    train(TrainConfig(**named("whole steps on one", **whole)))
    return folder


@pytest.mark.parametrize("name", ["two", "adapter"])
def test_interrupted_equals_uninterrupted_bit_for_bit_on_two_processes(runs: Path, name: str) -> None:
    assert contents(runs / f"{name}, stopped") == contents(runs / name)


@pytest.mark.parametrize("name", ["two", "one then two", "two then one"])
def test_any_number_of_processes_trains_the_same_pairs_to_the_same_numbers(runs: Path, name: str) -> None:
    found, expected = contents(runs / name), contents(runs / "one")
    assert len(found["metrics"]) == len(expected["metrics"])
    for line, other in zip(found["metrics"], expected["metrics"], strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)
    rows, others = found["pair_logps"]["pair_logps"], expected["pair_logps"]["pair_logps"]
    assert [row[:3] for row in rows] == [row[:3] for row in others]
    np.testing.assert_allclose([row[3:] for row in rows], [row[3:] for row in others], rtol=1e-4)
    model, same = (AutoModelForCausalLM.from_pretrained(runs / n / "final") for n in (name, "one"))
    for parameter, other in zip(model.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "same"), [("two", "one"), ("single pairs on two", "single pairs on one")])
def test_all_processes_compare_their_pairs_of_the_first_step(runs: Path, name: str, same: str) -> None:
    found, expected = (json.loads((runs / run / "parity.json").read_text()) for run in (name, same))
    assert found.pop("worst_row") in range(28)
    exact = ("pairs", "tokens", "alone_tokens", "ok", "dtype", "cached_dtype")
    assert [found[key] for key in exact] == [expected[key] for key in exact]
    assert found["ok"]
    assert abs(found["max"] - expected["max"]) < 1e-5


def test_fewer_pairs_than_processes_train_the_same(runs: Path) -> None:
    found, expected = (contents(runs / f"single pairs on {n}")["metrics"] for n in ("two", "one"))
    for line, other in zip(found, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_losses_of_whole_steps_see_the_pairs_of_all_processes(runs: Path) -> None:
    one, two = (runs / f"whole steps on {n}" for n in ("one", "two"))
    for line, other in zip(contents(two)["metrics"], contents(one)["metrics"], strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)
    kept, same = (
        json.loads((max((run / "checkpoints").iterdir()) / "training_state.json").read_text())["running"]
        for run in (two, one)
    )
    assert kept == pytest.approx(same, rel=1e-3, abs=1e-6)
    assert kept["steps"] == 4


def test_a_checkpoint_of_two_processes_is_a_model_that_transformers_loads(runs: Path) -> None:
    newest = max((runs / "two" / "checkpoints").iterdir())
    model = AutoModelForCausalLM.from_pretrained(newest)
    final = AutoModelForCausalLM.from_pretrained(runs / "two" / "final")
    assert newest.name == f"step-{STEPS:08d}"
    for parameter, other in zip(model.parameters(), final.parameters(), strict=True):
        assert torch.equal(parameter, other)
    names = {file.suffix for file in newest.rglob("*") if file.is_file()}
    assert names <= {".safetensors", ".json", ".md", ".jinja", ".txt", ".model"}
    assert len([*(newest / "optimizer").glob("*.safetensors")]) >= 2
