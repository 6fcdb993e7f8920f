"""A short pair's log-probs are the same whatever shares its batch, also where the embedding looks at
the batch.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import CPU, HEADS, VOCABULARY, save_random

from dpo_opt.optimize.checkpoint.export import write_model
from dpo_opt.optimize.forward.load_policy import load_policy
from dpo_opt.optimize.forward.packing import Group
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.transformers_scorer import HfScorer
from dpo_opt.schemas.pairs import TokenSequence

ORIGINAL = 24
LONG = {"short_factor": [1.0] * 4 + [1.5] * 4, "long_factor": [1.0] * 2 + [9.0] * 6}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": (
        "Phi3Config",
        {
            **{name: value for name, value in HEADS.items() if name != "head_dim"},
            "original_max_position_embeddings": ORIGINAL,
            "rope_scaling": {"type": "longrope", **LONG},
        },
    ),
    "longrope-with-mscale": (
        "PhimoeConfig",
        {
            **HEADS,
            "num_local_experts": 4,
            "rope_scaling": {
                "type": "longrope",
                "original_max_position_embeddings": ORIGINAL,
                "short_mscale": 1.1,
                "long_mscale": 1.6,
                **LONG,
            },
        },
    ),
    "dynamic": (
        "LlamaConfig",
        {
            **HEADS,
            "max_position_embeddings": ORIGINAL,
            "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
        },
    ),
}


def group(prompt: int, *completions: int) -> Group:
    rng = np.random.default_rng(prompt)
    ids = [rng.integers(3, VOCABULARY, size=n).astype(np.int32) for n in (prompt, *completions)]
    return tuple(TokenSequence(ids[0], completion) for completion in ids[1:])


def policy_of(folder: Path, max_length: int, dtype: torch.dtype = torch.float32) -> Policy:
    return load_policy(folder, dtype=dtype, device=CPU, trainable=True, max_length=max_length)


@torch.no_grad()
def logps(policy: Policy, *groups: Group) -> torch.Tensor:
    """Of the first group, in one batch with the others."""
    return torch.cat(policy.sequence_logps(groups)[: len(groups[0])])


@pytest.mark.parametrize("name", MODELS)
def test_a_short_pair_is_the_same_alone_beside_a_long_one_and_after_one(tmp_path: Path, name: str) -> None:
    save_random(*MODELS[name], tmp_path)
    policy = policy_of(tmp_path, 64)
    short, long, mixed = group(7, 5, 6), group(40, 8, 9), group(15, 3, 30)
    alone = logps(policy, short)
    for other in (long, mixed):
        torch.testing.assert_close(logps(policy, short, other), alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(logps(policy, short), alone, rtol=0, atol=1e-5)
    # The two sides of a pair that stands on both sides of the boundary.
    both = logps(policy, mixed).split([3, 30])
    for side, found in enumerate(both):
        torch.testing.assert_close(logps(policy, (mixed[side],)), found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_longest_sequence_of_the_run_decides(tmp_path: Path, name: str) -> None:
    save_random(*MODELS[name], tmp_path)
    short = group(7, 5, 6)
    below, at, above = (logps(policy_of(tmp_path, ORIGINAL + n), short) for n in (-1, 0, 1))
    torch.testing.assert_close(below, at, rtol=0, atol=0)
    assert (above - at).abs().max() > (1e-3 if name == "dynamic" else 0.1)
    names = [HfScorer(tmp_path, dtype="float32", max_length=ORIGINAL + n).numerics.rope for n in (0, 1)]
    assert len(set(names)) == 2
    assert "fixed" not in names


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_is_the_configuration_that_was_loaded(tmp_path: Path, name: str) -> None:
    save_random(*MODELS[name], tmp_path / "model")
    policy = policy_of(tmp_path / "model", 64)
    (tmp_path / "saved").mkdir()
    (tmp_path / "tokenizer").mkdir()
    before = logps(policy, group(7, 5, 6))
    write_model(
        policy, tmp_path / "saved", source=tmp_path / "model", tokenizer_dir=tmp_path / "tokenizer", card=""
    )
    loaded, saved = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("model", "saved"))
    assert saved == loaded
    # And the policy goes on with its own.
    torch.testing.assert_close(logps(policy, group(7, 5, 6)), before, rtol=0, atol=0)
