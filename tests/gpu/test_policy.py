"""Packed, prefix-shared log-probs and gradients on a CUDA device against separate full-logit forwards."""

import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from dpo_opt.optimize.forward import logps as logps_module
from dpo_opt.optimize.forward.activations import checkpoint_activations
from dpo_opt.optimize.forward.attention import SEGMENT_ATTENTION
from dpo_opt.optimize.forward.load_policy import load_policy
from dpo_opt.optimize.forward.logps import Head, token_logps
from dpo_opt.optimize.forward.packing import Group
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.transformers_scorer import HfScorer
from dpo_opt.schemas.pairs import TokenSequence

pytestmark = pytest.mark.gpu

SIZES: dict[str, Any] = {
    "vocab_size": 503,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "initializer_range": 0.06,
    "max_position_embeddings": 512,
}
MODELS = [
    pytest.param(LlamaConfig(**SIZES), id="llama"),
    pytest.param(Qwen3Config(**SIZES), id="qwen3"),
    pytest.param(MistralConfig(**SIZES, sliding_window=24), id="mistral-windowed"),
    pytest.param(Qwen3Config(**SIZES, tie_word_embeddings=True), id="tied"),
]


def sequences_of(model: PreTrainedModel) -> list[Group]:
    """Pairs of all shapes: shared openings, one-token completions, and one prompt with five completions."""
    rng = np.random.default_rng(0)
    vocabulary = model.config.vocab_size

    def ids(count: int) -> np.ndarray:
        return rng.integers(0, vocabulary, size=count).astype(np.int32)

    groups: list[Group] = []
    for prompt_length, chosen_length, rejected_length in [
        (1, 40, 30),
        (80, 1, 50),
        (60, 70, 1),
        (130, 90, 64),
    ]:
        prompt, opening = ids(prompt_length), ids(prompt_length % 7)
        completions = (np.concatenate([opening, ids(n)]) for n in (chosen_length, rejected_length))
        groups.append(tuple(TokenSequence(prompt, completion) for completion in completions))
    prompt = ids(33)
    groups.append(tuple(TokenSequence(prompt, ids(n)) for n in (20, 1, 64, 7, 31)))
    return groups


def full_logps(model: PreTrainedModel, sequence: TokenSequence, device: torch.device) -> Tensor:
    """One sequence, all logits, the model's own attention."""
    joined = np.concatenate([sequence.prompt_ids, sequence.completion_ids]).astype(np.int64)
    ids = torch.from_numpy(joined).to(device)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    logps = logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
    return logps[len(sequence.prompt_ids) - 1 :]


def with_gradients(model: PreTrainedModel, logps: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs, and the gradient of a sum of them with weights of both signs as one vector."""
    model.zero_grad()
    (logps * torch.linspace(-1, 1, len(logps), device=logps.device)).sum().backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return logps.detach().float(), torch.cat(grads)


def models(config: PreTrainedConfig, device: torch.device) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same random fp32 model with its own attention, and with ours."""
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    stock.to(device)
    ours = copy.deepcopy(stock)
    ours.set_attn_implementation(SEGMENT_ATTENTION)
    return stock, ours


@pytest.mark.parametrize("config", MODELS)
def test_fp32_equals_separate_forwards(cuda: torch.device, config: PreTrainedConfig) -> None:
    stock, ours = models(config, cuda)
    groups = sequences_of(stock)
    separate = torch.cat([full_logps(stock, s, cuda) for group in groups for s in group])
    expected, expected_grad = with_gradients(stock, separate)
    packed = torch.cat(Policy(ours, cuda, torch.float32, packs=True).sequence_logps(groups))
    found, found_grad = with_gradients(ours, packed)
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (found_grad - expected_grad).norm() < 1e-4 * expected_grad.norm()


@pytest.mark.parametrize("config", MODELS)
def test_bf16_is_as_near_to_fp32_as_separate_bf16_forwards_are(
    cuda: torch.device, config: PreTrainedConfig
) -> None:
    stock, ours = models(config, cuda)
    groups = sequences_of(stock)
    sequences = [s for group in groups for s in group]
    exact, exact_grad = with_gradients(stock, torch.cat([full_logps(stock, s, cuda) for s in sequences]))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        separate = torch.cat([full_logps(stock, s, cuda) for s in sequences])
    usual, usual_grad = with_gradients(stock, separate)
    packed = torch.cat(Policy(ours, cuda, torch.bfloat16, packs=True).sequence_logps(groups))
    found, found_grad = with_gradients(ours, packed)

    noise, error = usual - exact, found - exact
    assert 0 < noise.std() < 0.05
    assert error.std() < 1.5 * noise.std()
    # A wrong mask or a shifted row would show as a bias; noise has none beyond its standard error.
    assert error.mean().abs() < 4 * noise.std() / len(noise) ** 0.5
    assert (found_grad - exact_grad).norm() < 1.5 * (usual_grad - exact_grad).norm()


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_activations_are_the_kept_ones(
    cuda: torch.device, mode: Literal["full", "selective"]
) -> None:
    _, kept = models(LlamaConfig(**SIZES), cuda)
    _, recomputed = models(LlamaConfig(**SIZES), cuda)
    checkpoint_activations(recomputed, mode)
    groups = sequences_of(kept)
    (expected, expected_grad), (found, found_grad) = (
        with_gradients(
            model, torch.cat(Policy(model, cuda, torch.bfloat16, packs=True).sequence_logps(groups))
        )
        for model in (kept, recomputed)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    # The fused kernel adds up the gradients of queries in no fixed order.
    assert (found_grad - expected_grad).norm() < 0.01 * expected_grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 20.0])
# Of 3,000 rows a block has 1,341, and all derivatives are kept; or a block has 167, and those of 4 or 8 are.
@pytest.mark.parametrize(
    "most", [None, logps_module._Bytes(block=2**25, part=2**23, kept=2**27)], ids=["few", "many"]
)
def test_the_head_gives_the_log_probs_and_gradients_of_full_logits(
    cuda: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    softcap: float | None,
    most: logps_module._Bytes | None,
) -> None:
    if most is not None:
        monkeypatch.setattr(logps_module, "_ON_GPU", most)
    generator = torch.Generator().manual_seed(0)
    rows, width, vocabulary = 3000, 128, 50_021
    hidden = torch.randn(rows, width, generator=generator).to(cuda, dtype).requires_grad_()
    # A policy's own weights are fp32 masters.
    weight = (torch.randn(vocabulary, width, generator=generator) * 0.2).to(cuda).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), generator=generator).to(cuda)
    upstream = torch.randn(rows, generator=generator).to(cuda)
    found = token_logps(hidden, Head(weight, None, 1.0, softcap), targets, dtype=dtype)
    found_grads = torch.autograd.grad(found, (hidden, weight), upstream)

    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    logits = wide[0] @ wide[1].T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    expected_grads = torch.autograd.grad(expected, wide, upstream.double())

    assert found.dtype == torch.float32
    # In bf16 the head may round its operands to TF32, and derivatives to bf16; it may not round logits.
    error = found.double() - expected
    assert error.abs().max() < (1e-4 if dtype == torch.float32 else 0.05)
    assert error.mean().abs() < (1e-5 if dtype == torch.float32 else 1e-3)
    for mine, exact in zip(found_grads, expected_grads, strict=True):
        off = (mine.double() - exact).norm() / exact.norm()
        assert off < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_scorer_scores_on_the_device(cuda: torch.device, tiny_model: Path, dtype: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval().to(cuda)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 250, size=n).astype(np.int32) for n in (3, 60, 120)]
    sequences = [
        TokenSequence(prompt, rng.integers(2, 250, size=n).astype(np.int32))
        for prompt in prompts
        for n in (1, 17, 90)
    ]
    scorer = HfScorer(tiny_model, dtype=dtype)
    found = scorer.token_logps(sequences)
    assert scorer.policy.device.type == "cuda"
    assert scorer.policy.packs
    with torch.no_grad():
        expected = [full_logps(model, s, cuda).cpu().numpy() for s in sequences]
    assert [len(x) for x in found] == [len(s.completion_ids) for s in sequences]
    errors = np.concatenate(found) - np.concatenate(expected)
    assert np.abs(errors).max() < (1e-4 if dtype == "float32" else 0.3)
    assert abs(errors.mean()) < (1e-5 if dtype == "float32" else 0.01)


def test_a_process_that_allows_tf32_loads_and_scores_in_fp32_all_the_same(
    cuda: torch.device, tiny_model: Path
) -> None:
    exact = load_policy(tiny_model, dtype=torch.float32, device=cuda, trainable=True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        policy = load_policy(tiny_model, dtype=torch.float32, device=cuda, trainable=True)
        groups = sequences_of(exact.model)
        with torch.no_grad():
            for found, wanted in zip(
                policy.sequence_logps(groups), exact.sequence_logps(groups), strict=True
            ):
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    finally:
        torch.set_float32_matmul_precision(before)
