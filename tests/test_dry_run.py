"""What ``train --dry-run`` says about memory, for a person and for a machine."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from command_line import printed
from fakes import preference_rows, write_jsonl

from dpo_opt.cli import main
from dpo_opt.optimize.transformers_scorer import HfScorer
from dpo_opt.precompute import PrecomputeConfig, precompute


@pytest.fixture(scope="module")
def shards(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pairs, scored."""
    base = tmp_path_factory.mktemp("plans")
    config = PrecomputeConfig(
        model=str(tiny_model),
        data=write_jsonl(base / "data.jsonl", preference_rows(12)),
        shards=base / "shards",
        dtype="float32",
    )
    precompute(config, scorer=HfScorer(tiny_model, dtype="float32"))
    return config.shards


def dry_run(shards: Path, model: Path, run: Path, *extra: object) -> str:
    where = ("--shards", shards, "--model", model, "--output-dir", run)
    said = printed("train", *where, "--dry-run", *extra)
    assert not run.exists()
    return said


def test_memory_is_shown_by_component_and_adds_up(shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    plan = json.loads(dry_run(shards, tiny_model, tmp_path / "run", "--json", "--dtype", "float32"))
    memory = plan["memory_gb"]
    parts = ("weights", "gradients", "optimizer state", "activations", "head", "copy of a save")
    assert memory["total"] == pytest.approx(sum(memory[name] for name in parts), abs=1e-5)
    assert memory["weights"] == pytest.approx(4 * plan["parameters"] / 1e9, abs=1e-5)
    assert memory["optimizer state"] == pytest.approx(2 * memory["weights"], abs=1e-5)
    assert memory["copy of a save"] == pytest.approx(memory["weights"] + memory["optimizer state"], abs=1e-5)
    assert memory["activations"] > 0
    assert plan["gpus"] is None
    assert memory["reference model"] == 0
    assert memory["an online reference would add"] == pytest.approx(memory["weights"], abs=1e-5)
    assert plan["trained"] == plan["parameters"]
    assert plan["micro_batch_tokens"] >= sum(plan["longest_pair"][k] for k in ("prompt", "chosen"))


def plan_scoring(model: Path, folder: Path, *extra: object) -> dict[str, Any]:
    data = write_jsonl(folder / "data.jsonl", preference_rows(64))
    command = ["precompute", "--model", model, "--data", data, "--shards", folder / "new", "--backend", "hf"]
    arguments = [str(argument) for argument in (*command, "--dry-run", *extra)]
    words, machine = CliRunner().invoke(main, arguments), CliRunner().invoke(main, [*arguments, "--json"])
    assert (words.exit_code, machine.exit_code) == (0, 0), machine.output
    return {"words": words.stdout, **json.loads(machine.stdout)["forecast"]}


def test_what_scoring_takes_is_forecast_for_the_workers_that_share_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = plan_scoring(tiny_model, tmp_path, "--launcher", "slurm", "--num-workers", 8)
    assert "8, for 8 workers with 1 each" in few["words"]
    assert few["warnings"] == ["of 8 workers 7 would have nothing to do (shards: 1)"]
    assert few["advised_pairs_per_shard"] == 8
    assert few["weights_gb_per_gpu"] == 4 * few["parameters"] / 1e9

    monkeypatch.setattr("dpo_opt.scoring_forecast.count_parameters", lambda folder: 10**15)
    array = ("--launcher", "slurm", "--num-workers", 2, "--gpus-per-worker", 4)
    large = plan_scoring(tiny_model, tmp_path, *array)
    assert large["gpu_hours"] == pytest.approx(2 * 1e15 * large["tokens"] / (0.4 * 989e12) / 3600)
    assert "3 would be idle without --engine-option tensor_parallel_size=4" in large["words"]
    # One shard: the second worker waits, and the first has all of it.
    assert large["hours"] == pytest.approx(large["gpu_hours"] / 4)
    split = plan_scoring(tiny_model, tmp_path, *array, "--pairs-per-shard", 8)
    assert split["hours"] == pytest.approx(large["gpu_hours"] / 8)
    assert split["seconds_per_shard"] == pytest.approx(large["gpu_hours"] * 3600 / 4 / 8)
    # Advised is a size with which a shard takes 2 to 10 minutes.
    size = large["advised_pairs_per_shard"]
    assert 120 <= large["gpu_hours"] * 3600 / 4 / 64 * size <= 600
    assert f"--pairs-per-shard {size}" in large["words"]


def test_the_options_that_save_memory_are_seen_to_save_it(
    shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    def memory(*extra: object) -> dict[str, float]:
        shown = dry_run(shards, tiny_model, tmp_path / "run", "--micro-batch-tokens", 8192, "--json", *extra)
        found: dict[str, float] = json.loads(shown)["memory_gb"]
        return found

    plain = memory()
    none, full = (memory("--activation-checkpointing", mode)["activations"] for mode in ("none", "full"))
    assert max(full, plain["activations"]) < 0.9 * none
    assert memory("--optim", "rmsprop")["optimizer state"] < plain["optimizer state"]


def test_a_run_that_fits_on_a_gpu_is_said_to(shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    shown = dry_run(shards, tiny_model, tmp_path / "run", "--gpus", "2xh100-80gb")
    assert "it fits on each of 2 x H100-80GB (79.5 GB can be used)" in shown
    assert "on cuda" in shown


def test_each_change_that_is_proposed_was_counted(
    shards: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(*extra: object) -> dict[str, Any]:
        shown = dry_run(shards, tiny_model, tmp_path / "run", "--json", "--gpus", "1x80GB", *extra)
        found: dict[str, Any] = json.loads(shown)
        return found

    least = plan("--activation-checkpointing", "full")["memory_gb"]["total"]
    monkeypatch.setattr("dpo_opt.optimize.memory.gpus._USABLE", 1.001 * least / 80)
    forecast = plan()["gpus"]
    assert not forecast["fits"]
    *others, last = forecast["changes"]
    assert [change["fits"] for change in forecast["changes"]] == [False] * len(others) + [True]
    assert forecast["changes"][0]["options"] == "--activation-checkpointing full"
    changed = plan(*last["options"].split())
    assert changed["gpus"]["fits"]
    assert changed["memory_gb"]["total"] == last["total_gb"]

    monkeypatch.setattr("dpo_opt.optimize.memory.gpus._USABLE", 1e-9)
    shown = dry_run(shards, tiny_model, tmp_path / "run", "--gpus", "1x80GB", "--use-peft")
    assert "it does NOT fit on 1 x 80GB" in shown
    assert "--activation-checkpointing full" in shown
    assert "--param-dtype" not in shown
    assert "none of these fits: use more or larger GPUs, or a smaller model" in shown


def test_a_forecast_is_only_of_a_dry_run(shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    command = ["train", "--shards", shards, "--model", tiny_model, "--output-dir", tmp_path / "run"]
    result = CliRunner().invoke(main, [str(part) for part in (*command, "--gpus", "1xH100-80GB")])
    assert result.exit_code != 0
    assert "--gpus works only with --dry-run" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_person_reads_a_table(shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    shown = dry_run(shards, tiny_model, tmp_path / "run", "--micro-batch-tokens", 2048)
    assert "2048 token rows per micro-batch" in shown
    assert "reference model: 0 GB, cached (online it would cost 0.0" in shown
    for name in ("weights", "gradients", "optimizer state", "activations", "head", "copy of a save", "total"):
        assert any(line.strip().startswith(name) and " GB" in line for line in shown.splitlines()), name
