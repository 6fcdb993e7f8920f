"""Human-labelled pairs and trained models: what made-up data cannot show.

Engines are compared with each other, and everything with a computation that shares no code with them:
one sequence at a time, all logits, softmax in float64.
"""

import gc
import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import torch
from fakes import ScriptedScorer
from transformers import AutoModelForCausalLM

from dpo_opt.optimize import TrainConfig, train
from dpo_opt.optimize.measure_parity import measure_parity
from dpo_opt.optimize.score_folder import score_shards
from dpo_opt.optimize.transformers_scorer import HfScorer
from dpo_opt.precompute import PrecomputeConfig, precompute
from dpo_opt.precompute.engine.vllm_model import VllmModel
from dpo_opt.schemas.manifest import Manifest
from dpo_opt.schemas.pairs import ScoredPair, Scorer, TokenSequence
from dpo_opt.schemas.shard_folder import ShardFolder

FILES = {"human_pairs.jsonl.gz": 3302, "hh_harmless_base_test.jsonl.gz": 2312}
# With fp32 on both sides only the order of additions differs.
FP32_NATS = 5e-3
# The small model gains nothing from more, and on a busy machine threads mostly wait for each other.
THREADS = 1


def sequences(pair: ScoredPair) -> tuple[TokenSequence, TokenSequence]:
    return TokenSequence(pair.prompt_ids, pair.chosen_ids), TokenSequence(pair.prompt_ids, pair.rejected_ids)


def cached(pairs: list[ScoredPair]) -> npt.NDArray[np.float64]:
    """All cached token log-probs of some pairs, in order."""
    parts = [v for p in pairs for v in (p.ref_chosen_token_logps, p.ref_rejected_token_logps)]
    return np.concatenate(parts).astype(np.float64)


@torch.no_grad()
def independent(model_folder: Path, pairs: list[ScoredPair]) -> npt.NDArray[np.float64]:
    """The same token log-probs from full logits."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    found = []
    for prompt, completion, _ in (s for pair in pairs for s in sequences(pair)):
        joined = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))
        logps = model(input_ids=joined[None]).logits[0].double().log_softmax(-1)
        positions = range(len(prompt) - 1, len(joined) - 1)
        found += [float(logps[i, joined[i + 1]]) for i in positions]
    return np.array(found)


def take(source: Path, count: int, target: Path) -> Path:
    """Rows spread evenly over a file."""
    lines = gzip.decompress(source.read_bytes()).splitlines(keepends=True)
    chosen = np.unique(np.linspace(0, len(lines) - 1, min(count, len(lines))).astype(int))
    target.write_bytes(b"".join(lines[i] for i in chosen))
    return target


def score(model: Path, data: Path, shards: Path, *, scorer: Scorer, **settings: Any) -> Manifest:
    config = PrecomputeConfig(
        model=str(model), data=data, shards=shards, dtype=scorer.numerics.dtype, **settings
    )
    return precompute(config, scorer=scorer)


class Agreement(NamedTuple):
    """Difference of two folders' token log-probs, in nats."""

    tokens: int
    mean: float
    sd: float
    largest: float


def agreement(first: Path, second: Path) -> Agreement:
    folders = [list(ShardFolder.open(path).pairs()) for path in (first, second)]
    assert [p.pair_id for p in folders[0]] == [p.pair_id for p in folders[1]]
    difference = cached(folders[0]) - cached(folders[1])
    return Agreement(
        len(difference), float(difference.mean()), float(difference.std()), float(np.abs(difference).max())
    )


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Path:
    return shared_data / "models" / "stories260K"


@pytest.fixture(scope="module")
def some_pairs(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """220 of the human pairs, of all three sources."""
    path = tmp_path_factory.mktemp("pairs") / "some.jsonl"
    return take(shared_data / "pairs" / "human_pairs.jsonl.gz", 220, path)


@pytest.fixture(scope="module")
def shards(stories: Path, some_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those pairs under the real model, by transformers in fp32, up to its whole context."""
    torch.set_num_threads(THREADS)
    folder = tmp_path_factory.mktemp("hf") / "shards"
    score(stories, some_pairs, folder, scorer=HfScorer(stories, dtype="float32"), pairs_per_shard=64)
    return folder


@pytest.fixture(scope="module")
def short_shards(stories: Path, some_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shorter of those pairs, so that several epochs take seconds."""
    torch.set_num_threads(THREADS)
    folder = tmp_path_factory.mktemp("short") / "shards"
    score(stories, some_pairs, folder, scorer=HfScorer(stories, dtype="float32"), max_length=192)
    return folder


@pytest.fixture(scope="module")
def run(short_shards: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few epochs of training on them."""
    torch.set_num_threads(THREADS)
    folder = tmp_path_factory.mktemp("training") / "run"
    train(
        TrainConfig(
            shards=short_shards,
            model=str(stories),
            output_dir=folder,
            batch_size=16,
            num_train_epochs=4,
            learning_rate=2e-4,
            warmup_steps=6,
            logging_steps=1,
        )
    )
    return folder


@pytest.mark.parametrize("name", FILES)
def test_every_row_of_a_real_file_is_kept_or_dropped_for_a_reason(
    shared_data: Path, stories: Path, tmp_path: Path, name: str
) -> None:
    data = shared_data / "pairs" / name
    manifest = score(stories, data, tmp_path, scorer=ScriptedScorer(), pairs_per_shard=500)
    assert manifest.rows == FILES[name]
    assert manifest.kept + sum(manifest.dropped.values()) == FILES[name]
    kept = [pair.row for pair in ShardFolder.open(tmp_path).pairs()]
    left_out = [
        row
        for commit in manifest.shards
        for row in pq.read_table(tmp_path / commit.dropped_file)["row"].to_pylist()
    ]
    assert sorted(kept + left_out) == list(range(FILES[name]))
    assert len(kept) == manifest.kept > 0.6 * FILES[name]


def test_cached_log_probs_are_those_of_full_logits(shards: Path, stories: Path) -> None:
    pairs = list(ShardFolder.open(shards).pairs())[::6]
    difference = np.abs(cached(pairs) - independent(stories, pairs))
    assert len(difference) > 2000
    assert difference.max() < 1e-4


def test_training_starts_at_ln_2_and_learns_the_humans_choices(run: Path, short_shards: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert lines[-1]["loss"] < lines[0]["loss"]
    score_shards(short_shards, model=str(run / "final"), output=run / "scores.parquet", dtype="float32")
    trained = pq.read_table(run / "scores.parquet").to_pylist()
    pairs = list(ShardFolder.open(short_shards).pairs())
    margins = np.array(
        [
            (row["chosen_logps"] - pair.ref_chosen_logps) - (row["rejected_logps"] - pair.ref_rejected_logps)
            for row, pair in zip(trained, pairs, strict=True)
        ]
    )
    reference_ranks = np.mean([pair.ref_chosen_logps > pair.ref_rejected_logps for pair in pairs])
    accuracy = np.mean(margins > 0)
    print(f"accuracy {accuracy:.3f}, the reference's own ranking {reference_ranks:.3f}, {len(pairs)} pairs")
    # 0.5 plus four standard errors.
    assert accuracy > 0.5 + 4 * math.sqrt(0.25 / len(pairs))
    assert accuracy > reference_ranks + 0.05


def test_log_probs_of_the_trained_policy_are_those_of_full_logits(run: Path, short_shards: Path) -> None:
    output = run / "scores-again.parquet"
    score_shards(short_shards, model=str(run / "final"), output=output, dtype="float32")
    rows = pq.read_table(output).to_pylist()[::6]
    pairs = list(ShardFolder.open(short_shards).pairs())[::6]
    found = np.array(
        [x for row in rows for side in ("chosen", "rejected") for x in row[f"{side}_token_logps"]]
    )
    expected = independent(run / "final", pairs)
    assert np.abs(found - expected).max() < 1e-4
    assert np.abs(expected - cached(pairs)).mean() > 0.01, "the policy did not move"


@pytest.fixture
def release_engine() -> Iterator[None]:
    """An engine holds its cache until it is collected."""
    yield
    gc.collect()


@pytest.mark.vllm
@pytest.mark.usefixtures("release_engine")
def test_both_engines_agree_on_real_pairs(
    shards: Path, stories: Path, some_pairs: Path, tmp_path: Path
) -> None:
    engine = VllmModel(stories, dtype="float32", max_length=512)
    score(stories, some_pairs, tmp_path, scorer=engine, pairs_per_shard=64)
    found = agreement(tmp_path, shards)
    print(f"vLLM minus transformers, fp32: {found}")
    assert found.tokens > 10_000
    assert abs(found.mean) < 1e-5
    assert found.largest < FP32_NATS


@pytest.mark.vllm
@pytest.mark.usefixtures("release_engine")
def test_the_trained_model_generates_in_vllm(run: Path, short_shards: Path) -> None:
    pairs = list(ShardFolder.open(short_shards).pairs())[:8]
    engine = VllmModel(run / "final", dtype="float32", max_length=512)
    prompts = [pair.prompt_ids[-400:] for pair in pairs]
    written = engine.sample(prompts, num_samples=2, max_new_tokens=16, temperature=1e-4, seed=0)
    sampler = HfScorer(run / "final", dtype="float32")
    expected = sampler.sample(prompts, num_samples=1, max_new_tokens=16, temperature=1e-4, seed=0)
    assert [len(completions) for completions in written] == [2] * 8
    for mine, other in zip(written, expected, strict=True):
        np.testing.assert_array_equal(mine[0].completion_ids, other[0].completion_ids)
    in_vllm = engine.token_logps([s for pair in pairs for s in sequences(pair)])
    difference = np.concatenate(in_vllm).astype(np.float64) - independent(run / "final", pairs)
    assert np.abs(difference).max() < FP32_NATS


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("release_engine")
@pytest.mark.parametrize("name", FILES)
def test_both_engines_agree_on_every_real_pair(
    shared_data: Path, stories: Path, tmp_path: Path, name: str
) -> None:
    data = shared_data / "pairs" / name
    scorers = {
        "vllm": VllmModel(stories, dtype="float32", max_length=512),
        "hf": HfScorer(stories, dtype="float32"),
    }
    for engine, scorer in scorers.items():
        score(stories, data, tmp_path / engine, scorer=scorer)
    found = agreement(tmp_path / "vllm", tmp_path / "hf")
    print(f"vLLM minus transformers, fp32, {name}: {found}")
    assert found.largest < FP32_NATS


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real language model in bf16, from PyPI."""
    from dpo_opt.demo_model import smollm2_folder
    from dpo_opt.schemas.errors import ConfigError

    try:
        return smollm2_folder(tmp_path_factory.mktemp("smollm2") / "model")
    except ConfigError as error:
        pytest.skip(error.what)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("release_engine")
def test_a_real_language_model_in_bf16(shared_data: Path, smollm2: Path, tmp_path: Path) -> None:
    """vLLM scores in bf16, a policy in bf16 and one in fp32 accept it; training starts at ln 2 and learns.

    Of few pairs, trained on in fp32: without instructions for bf16 a CPU takes four times as long for it.
    """
    data = take(shared_data / "pairs" / "human_pairs.jsonl.gz", 32, tmp_path / "pairs.jsonl")
    scorers = {
        "vllm": VllmModel(smollm2, dtype="bfloat16", max_length=320),
        "hf": HfScorer(smollm2, dtype="bfloat16"),
    }
    for name, scorer in scorers.items():
        score(smollm2, data, tmp_path / name, scorer=scorer, max_length=320)
    between = agreement(tmp_path / "vllm", tmp_path / "hf")
    print(f"bf16, vLLM minus transformers: {between}")
    assert abs(between.mean) < 0.01
    assert between.sd < 0.1
    sample = list(ShardFolder.open(tmp_path / "vllm").pairs())[::4]
    parity = measure_parity(scorers["hf"].policy, sample, cached_dtype="bfloat16")
    print(f"a policy in bf16: {parity}")
    assert parity.ok

    result = train(
        TrainConfig(
            shards=tmp_path / "vllm",
            model=str(smollm2),
            output_dir=tmp_path / "run",
            batch_size=8,
            max_steps=10,
            learning_rate=2e-5,
            logging_steps=1,
            dtype="float32",
        )
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    print(f"parity {result.parity}, losses {[round(line['loss'], 3) for line in lines]}")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=0.05)
    second_epoch = [line for line in lines if line["epoch"] > 1]
    assert np.mean([line["rewards/accuracies"] for line in second_epoch]) > 0.6
    assert np.mean([line["loss"] for line in second_epoch]) < math.log(2) - 0.02
    engine = VllmModel(result.final, dtype="bfloat16", max_length=320)
    prompts = [pair.prompt_ids for pair in sample[:4]]
    written = engine.sample(prompts, num_samples=1, max_new_tokens=8, temperature=1.0, seed=0)
    assert all(len(completions[0].completion_ids) > 0 for completions in written)
