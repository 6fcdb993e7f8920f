"""What ``train --dry-run`` says about memory, for a person and for a machine."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
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
    command = ["train", "--shards", shards, "--model", model, "--output-dir", run, "--dry-run", *extra]
    result = CliRunner().invoke(main, [str(argument) for argument in command])
    assert result.exit_code == 0, result.output
    assert not run.exists()
    return result.stdout


def test_memory_is_shown_by_component_and_adds_up(shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    plan = json.loads(dry_run(shards, tiny_model, tmp_path / "run", "--json", "--dtype", "float32"))
    memory = plan["memory_gb"]
    parts = ("weights", "gradients", "optimizer state", "activations", "head")
    assert memory["total"] == pytest.approx(sum(memory[name] for name in parts), abs=1e-5)
    assert memory["weights"] == memory["gradients"] == round(4 * plan["parameters"] / 1e9, 6)
    assert memory["activations"] > 0
    assert memory["reference model"] == 0
    assert memory["an online reference would add"] == memory["weights"]
    assert plan["trained"] == plan["parameters"]
    assert plan["micro_batch_tokens"] >= sum(plan["longest_pair"][k] for k in ("prompt", "chosen"))


def test_the_options_that_save_memory_are_seen_to_save_it(
    shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    def memory(*extra: object) -> dict[str, float]:
        shown = dry_run(shards, tiny_model, tmp_path / "run", "--micro-batch-tokens", 8192, "--json", *extra)
        found: dict[str, float] = json.loads(shown)["memory_gb"]
        return found

    plain = memory()
    assert memory("--activation-checkpointing", "full")["activations"] < 0.7 * plain["activations"]
    assert memory("--optim", "rmsprop")["optimizer state"] < plain["optimizer state"]


def test_a_person_reads_a_table(shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    shown = dry_run(shards, tiny_model, tmp_path / "run", "--micro-batch-tokens", 2048)
    assert "2048 token rows per micro-batch" in shown
    assert "reference model: 0 GB, cached (online it would cost 0.0" in shown
    for name in ("weights", "gradients", "optimizer state", "activations", "head", "total"):
        assert any(line.strip().startswith(name) and " GB" in line for line in shown.splitlines()), name
