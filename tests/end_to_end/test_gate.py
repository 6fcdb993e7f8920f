"""The gate before training at full size: a real model with planted defects, and sound models by the
hundred.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import PACKED, PADDED, VOCABULARY, load, save_random
from planted_defects import CACHE, FORWARD, Scored, failed

from dpo_opt.optimize.measure_parity import measure_parity
from dpo_opt.optimize.transformers_scorer import HfScorer
from dpo_opt.precompute.engine.score_pairs import score_pairs
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.pairs import ScoredPair, TokenizedPair

TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
QUESTIONS = [
    (
        "What is a good breakfast for a cold morning?",
        "Porridge with apples keeps you warm until noon.",
        "Ice.",
    ),
    (
        "Why is the sky blue?",
        "Air scatters short waves of light more than long ones.",
        "Because the sea is blue, and the sky is a mirror that hangs above it.",
    ),
    (
        "How do I keep basil alive indoors?",
        "Give it light, water it from below, and cut it often.",
        "Put it into the fridge.",
    ),
    (
        "Name three rivers of Europe.",
        "The Danube, the Rhine and the Tagus.",
        "The Danube, the Nile and the Amazon.",
    ),
]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def scored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    from dpo_opt.demo_model import smollm2_folder
    from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer

    try:
        folder = smollm2_folder(tmp_path_factory.mktemp("smollm2") / "model")
    except ConfigError as error:
        pytest.skip(error.what)
    tokenizer = load_tokenizer(folder)

    def ids(text: str) -> np.ndarray:
        return np.array(tokenizer(text)["input_ids"], dtype=np.int32)

    pairs = [
        tokenized(
            row, ids(f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"), ids(good), ids(bad)
        )
        for row, (asked, good, bad) in enumerate(QUESTIONS)
    ]
    return Scored(folder, score_pairs(pairs, HfScorer(folder, dtype=request.param)).pairs, request.param)


def tokenized(row: int, prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> TokenizedPair:
    return TokenizedPair(
        row=row,
        source=None,
        prompt_ids=prompt,
        chosen_ids=chosen,
        rejected_ids=rejected,
        chosen_truncated=False,
        rejected_truncated=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_every_planted_defect_is_noticed_on_a_real_model(scored: Scored) -> None:
    assert not scored.probe_objects()
    assert failed(scored.parity()) == []
    missed = []
    for name in FORWARD:
        objects, checks = scored.noticed_by(name)
        print(f"{scored.dtype} | {name} | {'yes' if objects else 'no'} | {', '.join(checks) or 'none'}")
        missed += [] if objects or checks else [name]
    for name, change in CACHE.items():
        checks = failed(scored.parity(change(scored.pairs)))
        print(f"{scored.dtype} | {name} | - | {', '.join(checks) or 'none'}")
        missed += [] if checks else [name]
    assert missed == []
    assert len(FORWARD) + len(CACHE) >= 15


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_sound_model_is_refused_in_two_hundred_runs(tmp_path: Path) -> None:
    """Every architecture in turn, other weights and other pairs each time, in both precisions."""
    kinds = {**PACKED, **PADDED}
    refused = []
    for seed in range(200):
        name = list(kinds)[seed % len(kinds)]
        dtype = ("float32", "bfloat16")[seed % 2]
        folder = tmp_path / str(seed)
        save_random(*kinds[name], folder, seed=seed)
        rng = np.random.default_rng(seed)

        def ids(count: int, rng: np.random.Generator = rng) -> np.ndarray:
            return rng.integers(3, VOCABULARY, size=count).astype(np.int32)

        pairs = [
            tokenized(row, *(ids(int(rng.integers(1, most))) for most in (40, 30, 30))) for row in range(8)
        ]
        cached: list[ScoredPair] = score_pairs(pairs, HfScorer(folder, dtype=dtype)).pairs
        policy = load(folder, dtype=getattr(torch, dtype))
        checks = failed(measure_parity(policy, cached, cached_dtype=dtype))
        if checks:
            refused.append((seed, name, dtype, checks))
    assert refused == []
