import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dpo_opt.precompute.engine import engine_arguments, vllm_model
from dpo_opt.precompute.engine.vllm_build import prepare_environment, vllm_version
from dpo_opt.precompute.engine.vllm_model import VllmModel
from dpo_opt.schemas.errors import ConfigError, DpoOptError
from dpo_opt.schemas.models import checkpoint_dtype, context_length
from dpo_opt.schemas.pairs import IdArray, TokenSequence

# In fp32 only the order of additions differs.
LIMIT = 5e-3
# Longer than what the engine computes in one step.
LONG_CONTEXT = 2500


def sequence(prompt: list[int], completion: list[int]) -> TokenSequence:
    return TokenSequence(np.array(prompt, np.int32), np.array(completion, np.int32))


def random_sequences(lengths: list[tuple[int, int]], *, vocabulary: int) -> list[TokenSequence]:
    rng = np.random.default_rng(0)
    return [
        sequence([0, *rng.integers(2, vocabulary, p - 1)], list(rng.integers(2, vocabulary, c)))
        for p, c in lengths
    ]


def hf_logps(folder: Path, sequences: list[TokenSequence]) -> list[np.ndarray]:
    """Log-probs by transformers' plain forward, one sequence at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    with torch.no_grad():
        for prompt, completion, _ in sequences:
            ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))
            rows = model(ids[None]).logits[0].double().log_softmax(-1)
            scored = rows[len(prompt) - 1 : -1].gather(1, ids[len(prompt) :, None])
            found.append(scored[:, 0].numpy())
    return found


def assert_close(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert [len(f) for f in found] == [len(e) for e in expected]
    difference = np.abs(np.concatenate(found) - np.concatenate(expected))
    measured = f"mean {difference.mean():.2e}, max {difference.max():.2e} nats, {len(difference)} tokens"
    assert difference.max() < LIMIT, measured
    # Values that were all alike would agree whatever they belong to.
    assert np.concatenate(expected).std() > 0.2, measured


@pytest.fixture(scope="module")
def long_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a longer context."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("long") / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": LONG_CONTEXT}))
    return folder


@pytest.fixture(scope="module")
def engine(long_model: Path) -> VllmModel:
    assert context_length(long_model) == LONG_CONTEXT
    return VllmModel(long_model, dtype="float32", max_length=LONG_CONTEXT)


@pytest.mark.vllm
def test_log_probs_are_those_of_transformers(engine: VllmModel, long_model: Path) -> None:
    lengths = [(1, 1), (1, 40), (40, 1), (7, 9), (16, 16), (100, 33), (31, 2), (32, 200), (5, 64)]
    sequences = random_sequences(lengths, vocabulary=270)
    # Two completions of one prompt, and the same sequence twice: what a prefix cache would mix up.
    sequences += [TokenSequence(sequences[5].prompt_ids, sequences[3].completion_ids), sequences[5]]
    found = engine.token_logps(sequences)
    assert {f.dtype for f in found} == {np.dtype("float32")}
    assert all((f <= 0).all() for f in found)
    assert_close(found, hf_logps(long_model, sequences))
    # The same sequence in another batch may be rounded otherwise, and no more than that.
    assert_close([found[5]], [found[-1]])


@pytest.mark.vllm
def test_the_longest_sequence_fills_the_context(engine: VllmModel, long_model: Path) -> None:
    sequences = random_sequences([(LONG_CONTEXT - 30, 30), (1, LONG_CONTEXT - 1)], vocabulary=270)
    assert_close(engine.token_logps(sequences), hf_logps(long_model, sequences))


@pytest.mark.vllm
def test_order_of_the_answers_is_that_of_the_questions(engine: VllmModel) -> None:
    sequences = random_sequences([(10 + i % 7, 3 + i % 5) for i in range(40)], vocabulary=270)
    forward = engine.token_logps(sequences)
    backward = engine.token_logps(sequences[::-1])[::-1]
    assert_close(forward, backward)
    assert engine.token_logps([]) == []


@pytest.mark.vllm
def test_samples_end_with_eos_where_they_finished(engine: VllmModel) -> None:
    prompts = [s.prompt_ids for s in random_sequences([(5, 1), (9, 1), (30, 1)], vocabulary=270)]
    written = engine.sample(prompts, num_samples=40, max_new_tokens=60, temperature=1.0, seed=0)
    assert [len(w) for w in written] == [40, 40, 40]
    completions = [c for w in written for c in w]
    for completion in completions:
        ids = completion.completion_ids
        assert 1 <= len(ids) <= 60
        assert completion.finished == (ids[-1] == 1)
        assert 1 not in ids[:-1]
        assert completion.finished or len(ids) == 60
    # With 1 in 270 tokens an EOS, both endings occur.
    assert 5 < sum(c.finished for c in completions) < 115


@pytest.mark.vllm
def test_the_seed_decides_the_samples(engine: VllmModel) -> None:
    prompts = [s.prompt_ids for s in random_sequences([(5, 1), (5, 1), (12, 1)], vocabulary=270)]

    def sample(seed: int) -> list[list[tuple[int, ...]]]:
        written = engine.sample(prompts, num_samples=4, max_new_tokens=12, temperature=1.0, seed=seed)
        return [[tuple(c.completion_ids.tolist()) for c in w] for w in written]

    first = sample(1)
    assert sample(1) == first
    assert sample(2) != first
    assert len({c for w in first for c in w}) == 12


@pytest.mark.vllm
def test_a_prompts_samples_depend_on_nothing_beside_it(engine: VllmModel) -> None:
    """120 seeded requests of 90 tokens are more than a step takes: none is prefilled in two of them."""
    prompts = [s.prompt_ids for s in random_sequences([(90, 1)] * 30, vocabulary=270)]

    def sample(chosen: list[IdArray]) -> list[list[list[int]]]:
        written = engine.sample(chosen, num_samples=4, max_new_tokens=8, temperature=1.0, seed=5)
        return [[c.completion_ids.tolist() for c in w] for w in written]

    together = sample(prompts)
    assert sample(prompts[::-1])[::-1] == together
    assert sample(prompts[7:8]) == together[7:8]


@pytest.mark.vllm
def test_samples_follow_the_models_distribution(engine: VllmModel, long_model: Path) -> None:
    (prompt,) = (s.prompt_ids for s in random_sequences([(20, 1)], vocabulary=270))
    (written,) = engine.sample([prompt], num_samples=2000, max_new_tokens=1, temperature=1.0, seed=3)
    counts = np.bincount([int(c.completion_ids[0]) for c in written], minlength=270)
    every = [TokenSequence(prompt, np.array([token], np.int32)) for token in range(270)]
    expected = 2000 * np.exp(np.concatenate(hf_logps(long_model, every)))
    assert expected.sum() == pytest.approx(2000)
    # Chi-square over 270 tokens: mean 269, sd 23; top-k or a temperature would be far beyond.
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < 269 + 6 * 23
    assert np.corrcoef(counts, expected)[0, 1] > 0.5


@pytest.mark.vllm
def test_a_trained_models_log_probs_are_those_of_transformers(shared_data: Path) -> None:
    folder = shared_data / "models" / "stories260K"
    context = context_length(folder)
    assert context == 512
    model = VllmModel(folder, dtype="float32", max_length=context)
    sequences = random_sequences([(3, 20), (200, 100), (412, 100), (1, 511)], vocabulary=512)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Once upon a time, there was a little girl named Lily. She had a red ball."
    story = tokenizer(text)["input_ids"]
    sequences.append(sequence(story[:6], story[6:]))
    found = model.token_logps(sequences)
    assert_close(found, hf_logps(folder, sequences))
    # A trained model finds a story likelier than noise, by far.
    assert found[-1].mean() > found[0].mean() + 3


@pytest.mark.vllm
def test_an_engine_that_cannot_run_a_model_says_what_to_do(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    with pytest.raises(DpoOptError, match="vLLM cannot run this model") as caught:
        VllmModel(folder, dtype="float32", max_length=64).token_logps([sequence([0], [5])])
    assert "--backend hf" in str(caught.value.fix)


def answer(token_ids: list[int], *, cached: int = 0) -> Any:
    """What an engine returns for a request, as far as it is read."""
    logps = [-float(i) for i in range(len(token_ids))]
    return SimpleNamespace(
        prompt_logprobs=SimpleNamespace(token_ids=token_ids, logprobs=logps), num_cached_tokens=cached
    )


def test_without_vllm_the_way_out_is_said(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_model, "vllm_version", lambda: None)
    with pytest.raises(ConfigError, match="vLLM is not installed") as caught:
        VllmModel(tiny_model, dtype="float32", max_length=10)
    assert "--backend hf" in str(caught.value.fix)


@pytest.mark.parametrize(("version", "works"), [("0.17.9", False), ("0.18.0", True), ("1.0", True)])
def test_versions_that_run_a_models_code_are_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, version: str, works: bool
) -> None:
    monkeypatch.setattr(vllm_model, "vllm_version", lambda: version)

    def make() -> VllmModel:
        return VllmModel(tiny_model, dtype="bfloat16", max_length=10)

    if works:
        assert make().numerics == ("vllm", version, "prompt_logprobs+reuse", "bfloat16", "{}", "fixed")
    else:
        with pytest.raises(ConfigError, match=r"vLLM 0\.17\.9 is too old"):
            make()


@pytest.mark.vllm
def test_what_scores_is_recorded(tiny_model: Path) -> None:
    numerics = VllmModel(tiny_model, dtype="float32", max_length=10).numerics
    assert numerics == ("vllm", vllm_version(), "prompt_logprobs+reuse", "float32", "{}", "fixed")


def test_the_users_environment_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    prepare_environment()
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


class Started:
    """What an engine was started with."""

    settings: dict[str, Any]

    def __init__(self, **settings: Any) -> None:
        Started.settings = settings


@pytest.mark.vllm
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_engine_is_told_the_dtype_and_never_left_to_choose(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    # Left to itself it would take half precision for an fp32 checkpoint.
    assert checkpoint_dtype(tiny_model) == "float32"
    monkeypatch.setattr("vllm.LLM", Started)
    VllmModel(tiny_model, dtype=dtype, max_length=10)._started()
    assert Started.settings["dtype"] == dtype
    assert Started.settings["max_model_len"] == 11
    assert Started.settings["trust_remote_code"] is False
    assert Started.settings["load_format"] == "safetensors"
    assert Started.settings["logprobs_mode"] == "raw_logprobs"


@pytest.mark.vllm
@pytest.mark.parametrize("cpu", [True, False])
def test_options_replace_what_the_engine_would_be_started_with(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, cpu: bool
) -> None:
    monkeypatch.setattr("vllm.LLM", Started)
    for module in (vllm_model, engine_arguments):
        monkeypatch.setattr(module, "is_cpu_build", lambda: cpu)
    VllmModel(tiny_model, dtype="float32", max_length=10)._started()
    usual = Started.settings
    assert usual["max_num_batched_tokens"] == 2048
    assert ("gpu_memory_utilization" in usual, "kv_cache_memory_bytes" in usual) == (not cpu, cpu)
    options = {"max_num_batched_tokens": 4096, "gpu_memory_utilization": 0.5, "quantization": "fp8"}
    VllmModel(tiny_model, dtype="float32", max_length=10, engine_options=options)._started()
    given = Started.settings
    assert {name: given[name] for name in options} == options
    # On a CPU the one would have no effect beside the other.
    assert "kv_cache_memory_bytes" not in given
    same = set(usual) - set(options) - {"kv_cache_memory_bytes"}
    assert {name: given[name] for name in same} == {name: usual[name] for name in same}


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("error", "said"), [(KeyError("factor"), "KeyError: 'factor'"), (ValueError(), "ValueError: no message")]
)
def test_what_stops_an_engine_at_its_start_is_said_with_its_kind(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fail(**settings: Any) -> None:
        raise error

    monkeypatch.setattr("vllm.LLM", fail)
    with pytest.raises(DpoOptError) as caught:
        VllmModel(tiny_model, dtype="float32", max_length=10)._started()
    assert caught.value.what == f"vLLM cannot run this model ({said})"


@pytest.mark.vllm
def test_an_engine_that_does_not_take_a_value_says_which(tiny_model: Path) -> None:
    model = VllmModel(
        tiny_model, dtype="float32", max_length=64, engine_options={"max_num_seqs": "many", "block_size": 32}
    )
    with pytest.raises(DpoOptError, match="max_num_seqs"):
        model.token_logps([sequence([0], [5])])
