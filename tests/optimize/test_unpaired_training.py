"""KTO on rows of one completion and a label: resumed, on two processes, in micro-batches, and its metrics."""

import json
import shutil
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchrun_training
from processes import torchrun
from refusals import bad_data, refusal
from training_runs import Interrupter, contents

from dpo_opt.optimize import TrainConfig, train
from dpo_opt.optimize.prepare import prepare
from dpo_opt.optimize.transformers_scorer import HfScorer
from dpo_opt.precompute import PrecomputeConfig, precompute
from dpo_opt.precompute.check.convert import convert
from dpo_opt.precompute.config import ConvertConfig
from dpo_opt.schemas.errors import Preempted
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.sidecars import WEIGHT, Column, write_column


@pytest.fixture(scope="module")
def unpaired_shards(shards: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of the pairs of ``shards``, without every fourth, in shards of 16."""
    folder = tmp_path_factory.mktemp("unpaired")
    convert(ConvertConfig(data=[str(shards.parent / "pairs.jsonl")], output=folder / "data", to="unpaired"))
    lines = (folder / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(line for i, line in enumerate(lines) if i % 4 != 3))
    config = PrecomputeConfig(
        model=str(tiny_model),
        data=[str(rows)],
        shards=folder / "shards",
        dtype="float32",
        pairs_per_shard=16,
    )
    assert precompute(config, scorer=HfScorer(tiny_model, dtype="float32")).kept == 42
    return folder / "shards"


@pytest.fixture(scope="module")
def kto(settings: dict[str, Any], unpaired_shards: Path) -> dict[str, Any]:
    """A run of several micro-batches a step, evaluations and checkpoints, whose z0 is soon above 0."""
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    own = {"shards": str(unpaired_shards), "loss_type": "kto", "num_train_epochs": 1, "learning_rate": 3e-4}
    return {**settings, **own, **weights}


@pytest.fixture(scope="module")
def undisturbed(kto: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run when nobody stops it."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(TrainConfig(**kto, output_dir=run)).steps == 5
    return run


def lines_of(run: Path) -> list[dict[str, float]]:
    return list(contents(run)["metrics"])


def require_alike(run: Path, other: Path) -> None:
    found, expected = contents(run), contents(other)
    assert len(found["metrics"]) == len(expected["metrics"])
    for line, right in zip(found["metrics"], expected["metrics"], strict=True):
        assert line == pytest.approx(right, rel=1e-4, abs=1e-5)
    rows, others = (c["pair_logps"]["pair_logps"] for c in (found, expected))
    assert [row[:3] for row in rows] == [row[:3] for row in others]
    np.testing.assert_allclose([row[3:] for row in rows], [row[3:] for row in others], rtol=1e-4)


@pytest.mark.parametrize("at", [4, 11])
def test_interrupted_equals_uninterrupted_bit_for_bit(
    at: int, kto: dict[str, Any], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        Interrupter(patched, at=at)
        with pytest.raises(Preempted):
            train(TrainConfig(**kto, output_dir=tmp_path / "run"))
    train(TrainConfig(**kto, output_dir=tmp_path / "run", resume=True))
    assert contents(tmp_path / "run") == contents(undisturbed)


@pytest.mark.parametrize("tokens", [40, 100_000])
def test_micro_batches_do_not_change_a_run(
    tokens: int, kto: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    train(TrainConfig(**{**kto, "micro_batch_tokens": tokens}, output_dir=tmp_path / "run"))
    require_alike(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_two_processes_train_as_one(kto: dict[str, Any], undisturbed: Path, tmp_path: Path) -> None:
    program = tmp_path / "runs.json"
    program.write_text(json.dumps([({**kto, "output_dir": str(tmp_path / "run")}, 0, 0)]), encoding="utf-8")
    torchrun(2, torchrun_training.__file__, program)
    require_alike(tmp_path / "run", undisturbed)


def test_an_evaluation_says_what_its_rows_say(kto: dict[str, Any], undisturbed: Path) -> None:
    """Recomputed from the log-probs that the run wrote, in batches of its size."""
    pairs = {pair.row: pair for pair in ShardFolder.open(Path(kto["shards"])).pairs()}
    (last,) = [line for line in lines_of(undisturbed) if line["step"] == 5 and "eval_loss" in line]
    logps = [r for r in contents(undisturbed)["pair_logps"]["pair_logps"] if r[:2] == ("eval", 5)]
    label, own, other = [], [], []
    for _, _, row, chosen, rejected in logps:
        pair = pairs[row]
        ratios = [chosen - pair.ref_chosen_logps, rejected - pair.ref_rejected_logps]
        label.append(bool(pair.label))
        own.append(ratios[0 if pair.label else 1])
        other.append(ratios[1 if pair.label else 0])
    assert len(label) > kto["batch_size"]
    losses, kls = [], []
    for begin in range(0, len(label), kto["batch_size"]):
        part = slice(begin, begin + kto["batch_size"])
        z0 = max(0.0, float(np.mean(other[part])))
        for desirable, ratio in zip(label[part], own[part], strict=True):
            gain = 0.1 * (ratio - z0) if desirable else 0.1 * (z0 - ratio)
            losses.append((1.5 if desirable else 0.5) * (1 - 1 / (1 + np.exp(-gain))))
            kls.append(z0)
    rewards = 0.1 * np.array(own)
    good = np.array(label)
    expected = {
        "eval_loss": np.mean(losses),
        "eval_kl": np.mean(kls),
        "eval_rewards/chosen": rewards[good].mean(),
        "eval_rewards/rejected": rewards[~good].mean(),
        "eval_rewards/margins": rewards[good].mean() - rewards[~good].mean(),
    }
    for name, value in expected.items():
        assert last[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    assert expected["eval_kl"] > 0
    assert "eval_rewards/accuracies" not in last


def test_training_tells_labels_apart(kto: dict[str, Any], tmp_path: Path) -> None:
    heavier = {"desirable_weight": 0.8, "undesirable_weight": 1.5, "learning_rate": 1e-3}
    train(TrainConfig(**{**kto, **heavier, "num_train_epochs": 2}, output_dir=tmp_path / "run"))
    first, *_, last = [line for line in lines_of(tmp_path / "run") if "eval_loss" in line]
    assert last["eval_rewards/margins"] > 0.6 > first["eval_rewards/margins"]
    assert last["eval_loss"] < 0.95 * first["eval_loss"]


def test_apo_zero_learns_from_rows_one_by_one(kto: dict[str, Any], tmp_path: Path) -> None:
    """A step may have a single row, as no estimate is taken over a step; `kl` is there all the same."""
    own = {"loss_type": "apo_zero_unpaired", "batch_size": 1, "max_steps": 30, "learning_rate": 1e-3}
    equal = {"desirable_weight": 1.0, "undesirable_weight": 1.0, "eval_steps": 15, "save_steps": None}
    train(TrainConfig(**{**kto, **own, **equal}, output_dir=tmp_path / "run"))
    first, *_, last = [line for line in lines_of(tmp_path / "run") if "eval_loss" in line]
    assert last["eval_rewards/margins"] > first["eval_rewards/margins"]
    assert last["eval_loss"] < first["eval_loss"]
    assert last["eval_kl"] > 0


def test_folders_and_losses_of_different_rows_are_refused(
    kto: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for name, of_pairs in (("kto", "kto_pair"), ("apo_zero_unpaired", "apo_zero")):
        given = {**settings, "loss_type": name, "output_dir": out}
        error = refusal(lambda given=given: prepare(TrainConfig(**given)))  # type: ignore[misc]
        assert error.what.startswith(f"--loss-type {name} learns from single completions")
        assert (error.fix or "").startswith(f"pass --loss-type {of_pairs}, or make two rows of each pair")
        assert "convert DATA --to unpaired" in (error.fix or "")
    for name in ("sigmoid", "kto_pair", "sft"):
        plain = {**settings, "shards": kto["shards"], "loss_type": name}
        error = refusal(lambda plain=plain: prepare(TrainConfig(**plain, output_dir=out)))  # type: ignore[misc]
        assert error.what.startswith(f"--loss-type {name} compares two completions")
        assert error.fix == "pass --loss-type kto"
    for own, other in ((kto, settings), (settings, kto)):
        beside = {**own, "eval_shards": [other["shards"]]}
        error = refusal(lambda beside=beside: prepare(TrainConfig(**beside, output_dir=out)))  # type: ignore[misc]
        assert error.where == str(other["shards"])
    with pytest.raises(ValueError, match="desirable_weight"):
        TrainConfig(**{**kto, "desirable_weight": 0.0}, output_dir=out)
    assert not out.exists()


def test_what_is_wrong_with_weights_is_said_of_rows_and_not_of_pairs(
    kto: dict[str, Any], unpaired_shards: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(unpaired_shards, tmp_path / "shards")
    config = TrainConfig(**{**kto, "shards": str(copied)}, output_dir=tmp_path / "run")
    for weight, said in ((0.0, "of all training rows are 0"), (1e308, "of the training rows add up to")):
        write_column(copied, WEIGHT, Column(array("q", range(42)), array("d", [weight] * 42)))
        error = bad_data(lambda: prepare(config))
        assert said in error.what
        assert "pair" not in (error.why or "")
