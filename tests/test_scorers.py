"""Which engine scores where nobody says so."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from fakes import preference_rows, write_jsonl

from dpo_opt import scorers
from dpo_opt.cli import main
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.engine import vllm_model
from dpo_opt.precompute.shards.reference import resolve_reference
from dpo_opt.schemas import models
from dpo_opt.schemas.manifest import COMMAND, load_manifest
from dpo_opt.schemas.weights import weights_digest
from dpo_opt.verify import verify


def engine(model: Path, **settings: Any) -> str:
    values = {"model": str(model), "data": "pairs.jsonl", "shards": "shards", "dtype": "float32"}
    return scorers.make_scorer(PrecomputeConfig.model_validate(values | settings)).numerics.engine


@pytest.mark.vllm
def test_cores_are_scored_on_with_transformers_and_gpus_with_vllm(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cpu_build, expected in ((True, "transformers"), (False, "vllm")):
        for module in (scorers, vllm_model):
            monkeypatch.setattr(module, "is_cpu_build", lambda answer=cpu_build: answer)
        assert engine(tiny_model) == expected
        assert engine(tiny_model, backend="vllm") == "vllm"
        assert engine(tiny_model, backend="hf") == "transformers"


@pytest.mark.vllm
def test_options_of_vllm_choose_vllm(tiny_model: Path) -> None:
    assert engine(tiny_model, engine_option=["max_num_seqs=3"]) == "vllm"


def test_without_vllm_transformers_scores(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (scorers, vllm_model):
        monkeypatch.setattr(module, "vllm_version", lambda: None)
        monkeypatch.setattr(module, "is_cpu_build", lambda: False)
    assert engine(tiny_model) == "transformers"


class Hub:
    """A repository whose branch moves on each time that somebody looks at it."""

    def __init__(self, cache: Path, *versions: Path) -> None:
        self.commits = [f"{i}" * 40 for i in range(len(versions))]
        self.asked: list[str | None] = []
        self._cache = cache
        for commit, version in zip(self.commits, versions, strict=True):
            shutil.copytree(version, cache / commit)

    def fetch(self, repository: str, *, kind: str, revision: str | None, **_: Any) -> Path:
        assert (repository, kind) == ("made/model", "model")
        moved = sum(asked is None for asked in self.asked)
        self.asked.append(revision)
        return self._cache / (revision or self.commits[min(moved, len(self.commits) - 1)])


@pytest.fixture
def hub(tiny_model: Path, other_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "snapshots", tiny_model, other_model)
    monkeypatch.setattr(models, "fetch", hub.fetch)
    monkeypatch.setattr(models, "_fetched", {})
    return hub


@pytest.mark.parametrize("slurm", [False, True])
def test_the_commit_that_is_scored_is_the_one_that_is_recorded(
    hub: Hub, tiny_model: Path, tmp_path: Path, slurm: bool
) -> None:
    data, shards = write_jsonl(tmp_path / "data.jsonl", preference_rows(4)), tmp_path / "shards"
    words = ["precompute", "--model", "made/model", "--data", str(data), "--shards", str(shards)]
    words += ["--backend", "hf", "--dtype", "float32"]
    if slurm:
        assert CliRunner().invoke(main, [*words, "--launcher", "slurm", "--num-workers", "2"]).exit_code == 0
        models._fetched.clear()
        words = ["precompute", "--config", str(shards / COMMAND)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert hub.asked.count(None) == 1
    assert load_manifest(shards).fingerprint.weights == weights_digest(tiny_model)
    assert yaml.safe_load((shards / COMMAND).read_text())["model"] == f"made/model@{hub.commits[0]}"
    assert verify(shards, model=f"made/model@{hub.commits[0]}", num_pairs=2, dtype="float32").ok


def test_a_model_is_taken_at_the_commit_that_is_asked_for(hub: Hub, other_model: Path) -> None:
    def found(model: str) -> tuple[str, str]:
        config = PrecomputeConfig.model_validate({"model": model, "data": "a.jsonl", "shards": "shards"})
        reference = resolve_reference(config)
        return reference.name, weights_digest(reference.folder)

    pinned = f"made/model@{hub.commits[1]}"
    assert found(pinned) == (pinned, weights_digest(other_model))
    assert hub.asked == [hub.commits[1]]
    assert found(str(other_model)) == (str(other_model), weights_digest(other_model))
