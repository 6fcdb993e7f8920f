"""Which engine scores where nobody says so."""

from pathlib import Path
from typing import Any

import pytest

from dpo_opt import scorers
from dpo_opt.precompute import vllm_model
from dpo_opt.precompute.config import PrecomputeConfig


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
