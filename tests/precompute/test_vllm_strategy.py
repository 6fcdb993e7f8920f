from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes import scripted_logps

from dpo_opt.precompute.engine import vllm_model
from dpo_opt.precompute.engine.vllm_model import VllmModel
from dpo_opt.precompute.engine.vllm_strategy import Strategy, choose_strategy, read_answer, request_settings
from dpo_opt.schemas.errors import DpoOptError
from dpo_opt.schemas.pairs import TokenSequence

FLAT = Strategy(token_ids=False, reuse=True)
TOKEN_IDS = Strategy(token_ids=True, reuse=True)


def sequence(prompt: Sequence[int], completion: Sequence[int]) -> TokenSequence:
    return TokenSequence(np.array(prompt, np.int32), np.array(completion, np.int32))


def flat(ids: list[int], *, cached: int = 0) -> Any:
    values = [-float(i) for i in range(len(ids))]
    return SimpleNamespace(
        prompt_logprobs=SimpleNamespace(token_ids=ids, logprobs=values), num_cached_tokens=cached
    )


@pytest.mark.parametrize(
    ("version", "cpu", "config", "name"),
    [
        ("0.32.0", True, {}, "prompt_logprobs+reuse"),
        ("0.18.1", True, {}, "prompt_logprobs+reuse"),
        ("0.31.2", False, {}, "prompt_logprobs"),
        ("0.32.0", False, {}, "token_ids+reuse"),
        ("0.33.0rc1", False, {"layer_types": ["full_attention", "sliding_attention"]}, "token_ids+reuse"),
        ("1.0.0", False, {"layer_types": ["linear_attention"]}, "token_ids"),
        ("0.32.0", True, {"text_config": {"model_type": "falcon_mamba"}}, "prompt_logprobs"),
        ("0.32.0", True, {"mamba_d_state": 16}, "prompt_logprobs"),
    ],
)
def test_the_strategy_follows_from_version_build_and_model(
    version: str, cpu: bool, config: dict[str, Any], name: str
) -> None:
    assert choose_strategy(version, cpu_build=cpu, model_config=config).name == name


def test_requests_say_all_that_vllm_needs_at_once() -> None:
    asked = request_settings(TOKEN_IDS, sequence([5, 6, 7], [8, 9]), reuse=True)
    ids = asked.pop("prompt_logprob_token_ids")
    assert (ids.tolist(), ids.dtype) == ([[8], [9]], np.dtype("int32"))
    assert asked == {
        "max_tokens": 1,
        "temperature": 0,
        "detokenize": False,
        "skip_reading_prefix_cache": False,
        "prompt_logprob_start": 2,
    }
    plain = request_settings(FLAT, sequence([5], [8]), reuse=False)
    assert (plain["skip_reading_prefix_cache"], plain["prompt_logprobs"], plain["flat_logprobs"]) == (
        True,
        0,
        True,
    )


def test_the_completions_part_is_taken() -> None:
    # Entry k belongs to token k + 1: the completion starts at token 3, so at entry 2.
    asked = sequence([5, 6, 7], [8, 9])
    for cached in (0, 1, 2):
        found = read_answer(FLAT, asked, flat([6, 7, 8, 9], cached=cached))
        assert found is not None
        assert found.tolist() == [-2.0, -3.0]
    single = read_answer(FLAT, sequence([5], [8]), flat([8]))
    assert single is not None
    assert single.tolist() == [0.0]


def test_an_answer_whose_first_row_was_cached_is_asked_for_again() -> None:
    # Row 2 predicts token 3, the first of the completion: with 3 cached tokens nobody computed it.
    assert read_answer(FLAT, sequence([5, 6, 7], [8, 9]), flat([6, 7, 8, 9], cached=3)) is None
    assert read_answer(TOKEN_IDS, sequence([5], [8]), SimpleNamespace(prompt_token_id_logprobs=None)) is None


@pytest.mark.parametrize("wrong", [[5, 6, 7, 8, 9], [5, 6, 7, 8], [7, 8, 9], [6, 7, 8], [6, 7, 9, 8], []])
def test_an_answer_to_another_question_is_refused(wrong: list[int]) -> None:
    with pytest.raises(DpoOptError, match="vLLM answered with"):
        read_answer(FLAT, sequence([5, 6, 7], [8, 9]), flat(wrong))


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2,), (2, 2)])
def test_scores_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    answer = SimpleNamespace(prompt_token_id_logprobs=np.zeros(shape, np.float32))
    with pytest.raises(DpoOptError, match="scores of shape"):
        read_answer(TOKEN_IDS, sequence([5, 6, 7], [8, 9]), answer)


BLOCK = 16


class DocumentedEngine:
    """vLLM's documented behaviour for token-id scores.

    Work is cached by whole blocks, at most all but the last token is read from there, and scores are None
    where the first row asked for was.
    """

    def __init__(self, *, noise: float = 0.0) -> None:
        self.cached: set[tuple[int, ...]] = set()
        self.computed_tokens = 0
        self.noise = noise

    def reset_prefix_cache(self) -> None:
        self.cached.clear()

    def generate(self, prompts: Any, params: Any, *, use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        return [self._one(p["prompt_token_ids"], q) for p, q in zip(prompts, params, strict=True)]

    def _one(self, ids: list[int], asked: Any) -> Any:
        hit = 0
        if not asked.skip_reading_prefix_cache:
            while hit + BLOCK <= len(ids) - 1 and tuple(ids[: hit + BLOCK]) in self.cached:
                hit += BLOCK
        self.computed_tokens += len(ids) - hit
        self.cached |= {tuple(ids[:end]) for end in range(BLOCK, len(ids) + 1, BLOCK)}
        start = asked.prompt_logprob_start
        if hit > start:
            return SimpleNamespace(prompt_token_id_logprobs=None, num_cached_tokens=hit)
        completion = np.array(ids[start + 1 :], np.int32)
        assert asked.prompt_logprob_token_ids[:, 0].tolist() == completion.tolist()
        values = scripted_logps(np.array(ids[: start + 1], np.int32), completion) - self.noise * (hit > 0)
        return SimpleNamespace(prompt_token_id_logprobs=values[:, None], num_cached_tokens=hit)


@pytest.fixture
def on_a_gpu(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> VllmModel:
    monkeypatch.setattr(vllm_model, "vllm_version", lambda: "0.32.0")
    monkeypatch.setattr(vllm_model, "is_cpu_build", lambda: False)
    return VllmModel(tiny_model, dtype="float32", max_length=200)


def pairs(count: int) -> list[TokenSequence]:
    """Two completions of each prompt; some prompts are whole blocks, some completions begin alike."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        prompt = rng.integers(2, 250, 8 + i)
        beginning = rng.integers(2, 250, 20 * (i % 3 == 0))
        found += [sequence(prompt, [*beginning, *rng.integers(2, 250, 9), side]) for side in (0, 1)]
    return found


@pytest.mark.vllm
def test_prompts_are_computed_once_and_every_value_is_right(
    on_a_gpu: VllmModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = DocumentedEngine()
    monkeypatch.setattr(on_a_gpu, "_started", lambda: engine)
    assert on_a_gpu.numerics.strategy == "token_ids+reuse"
    sequences = pairs(150)
    found = on_a_gpu.token_logps(sequences)
    for asked, values in zip(sequences, found, strict=True):
        np.testing.assert_array_equal(values, scripted_logps(asked.prompt_ids, asked.completion_ids))
    assert on_a_gpu.reuse_check is not None
    assert on_a_gpu.reuse_check.max == 0
    everything = sum(len(s.prompt_ids) + len(s.completion_ids) for s in sequences)
    assert engine.computed_tokens < 0.95 * everything


@pytest.mark.vllm
def test_a_cache_that_changes_values_is_noticed_before_any_is_kept(
    on_a_gpu: VllmModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = DocumentedEngine(noise=0.3)
    monkeypatch.setattr(on_a_gpu, "_started", lambda: engine)
    with pytest.raises(DpoOptError, match="with the prefix cache, log-probs differ"):
        on_a_gpu.token_logps(pairs(60)[40:])


@pytest.mark.vllm
def test_the_real_engine_reuses_prompts_and_gives_the_same_values(tiny_model: Path) -> None:
    rng = np.random.default_rng(1)
    sequences = []
    for i in range(12):
        prompt = [0, *rng.integers(2, 250, 95 + i)]
        beginning = rng.integers(2, 250, 40 * (i % 4 == 0))
        sequences += [sequence(prompt, [*beginning, *rng.integers(2, 250, 12), side]) for side in (5, 6)]
    reusing = VllmModel(tiny_model, dtype="float32", max_length=200)
    plain = VllmModel(tiny_model, dtype="float32", max_length=200, reuse=False)
    assert (reusing.numerics.strategy, plain.numerics.strategy) == (
        "prompt_logprobs+reuse",
        "prompt_logprobs",
    )
    expected = plain.token_logps(sequences)
    for found in (reusing.token_logps(sequences), reusing.token_logps(sequences[::-1])[::-1]):
        worst = max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))
        assert worst < 5e-4
    assert reusing.reuse_check is not None
    assert reusing.reuse_check.tokens > 100
    assert reusing.reuse_check.max < 5e-4
