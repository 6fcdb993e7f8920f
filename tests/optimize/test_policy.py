"""Log-probs and gradients against each architecture's own full-logit forward, one sequence at a time."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo_opt.optimize.packing import Group, Segment, pack
from dpo_opt.optimize.policy import Policy, compute_dtype, head_of, load_policy
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.pairs import TokenSequence

FullLogps = Callable[[PreTrainedModel, TokenSequence], Tensor]
CPU = torch.device("cpu")
VOCABULARY = 101
WINDOW = 8
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS: dict[str, Any] = {**SIZES, "head_dim": 16}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
STATES: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8}

PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", HEADS),
    "llama-tied": ("LlamaConfig", {**HEADS, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", SIZES),
    "qwen3": ("Qwen3Config", HEADS),
    "qwen3-moe": ("Qwen3MoeConfig", {**HEADS, **EXPERTS}),
    "mistral-windowed": ("MistralConfig", {**HEADS, "sliding_window": WINDOW}),
    "gemma3-windowed": ("Gemma3TextConfig", {**HEADS, "sliding_window": WINDOW}),
    "olmo3-windowed": ("Olmo3Config", {**SIZES, "sliding_window": WINDOW}),
    "phi-biased-head": ("PhiConfig", SIZES),
    "phi3": ("Phi3Config", SIZES),
    "gpt-neox": (
        "GPTNeoXConfig",
        {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "pad_token_id")},
    ),
    "granite-scaled": (
        "GraniteConfig",
        {**SIZES, "logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.7},
    ),
    "smollm3-without-positions": ("SmolLM3Config", {**SIZES, "no_rope_layers": [1, 1, 0, 1]}),
    "cohere-scaled": ("CohereConfig", {**SIZES, "logit_scale": 0.25}),
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            **SIZES,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    ),
}

PADDED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2-softcapped": ("Gemma2Config", {**HEADS, "sliding_window": WINDOW}),
    "gpt-oss-sinks": (
        "GptOssConfig",
        {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    ),
    # The window is in its mask only, and longer than what loading tries.
    "phimoe-hidden-window": ("PhimoeConfig", {**SIZES, "num_local_experts": 4, "sliding_window": 25}),
    "bloom-alibi": ("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 3, "n_head": 4}),
    "mamba": (
        "MambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3, "state_size": 8},
    ),
    "lfm2-convolutions": (
        "Lfm2Config",
        {**SIZES, "layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    ),
    "bamba-hybrid": ("BambaConfig", {**SIZES, **STATES, "attn_layer_indices": [1, 3]}),
    "qwen3-next": (
        "Qwen3NextConfig",
        {
            **HEADS,
            **EXPERTS,
            "shared_expert_intermediate_size": 32,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
}

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon-h1": ("FalconH1Config", {**SIZES, **STATES, "mamba_d_ssm": 128, "lm_head_multiplier": 0.5}),
    "recurrent-gemma": (
        "RecurrentGemmaConfig",
        {
            **{k: v for k, v in SIZES.items() if k != "max_position_embeddings"},
            "lru_width": 64,
            "attention_window_size": 25,
        },
    ),
    "llama4": (
        "Llama4TextConfig",
        {**HEADS, "intermediate_size_mlp": 96, "num_local_experts": 4, "attention_chunk_size": 25},
    ),
}


def save_random(kind: str, sizes: dict[str, Any], folder: Path) -> None:
    """Weights large enough that every token has its own log-prob: a wrong mask would show."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**sizes)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)


def load(folder: Path, *, dtype: torch.dtype = torch.float32, trainable: bool = True) -> Policy:
    return load_policy(folder, dtype=dtype, device=CPU, trainable=trainable)


def groups() -> list[Group]:
    """Pairs with and without common first words, of one token, with the shortest prompt; four completions."""
    rng = np.random.default_rng(1)

    def ids(count: int) -> np.ndarray:
        return rng.integers(3, VOCABULARY, size=count).astype(np.int32)

    found: list[Group] = []
    for prompt_length, lengths in (
        (21, (9, 13)),
        (30, (12, 4)),
        (1, (5, 6)),
        (12, (1, 7)),
        (7, (3, 4, 5, 6)),
    ):
        prompt = ids(prompt_length)
        completions = [ids(length) for length in lengths]
        if prompt_length == 21:
            completions[1][:3] = completions[0][:3]
        found.append(tuple(TokenSequence(prompt, completion) for completion in completions))
    return found


def contrast(values: list[Tensor]) -> Tensor:
    """A scalar in which every sequence counts, with both signs."""
    return sum(((-1) ** i * v.double().sum() for i, v in enumerate(values)), start=torch.zeros(()).double())


def assert_exact(folder: Path, full_logps: FullLogps) -> Policy:
    """The policy's log-probs and gradients are those of separate forwards through full logits."""
    policy = load(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = [full_logps(stock, sequence) for group in groups() for sequence in group]
    contrast(expected).backward()
    found = policy.sequence_logps(groups())
    contrast(found).backward()

    assert torch.cat(expected).std() > 0.2
    for mine, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=0, atol=1e-4)
    own = dict(policy.model.named_parameters())
    exact_grads = {n: p.grad for n, p in stock.named_parameters() if p.grad is not None}
    largest = max(float(grad.abs().max()) for grad in exact_grads.values())
    assert largest > 1
    assert {n for n, p in own.items() if p.grad is not None} == set(exact_grads)
    for name, exact in exact_grads.items():
        torch.testing.assert_close(
            own[name].grad, exact, rtol=0, atol=1e-4 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )
    return policy


@pytest.mark.parametrize("name", PACKED)
def test_packing_and_sharing_change_neither_log_probs_nor_gradients(
    tmp_path: Path, full_logps: FullLogps, name: str
) -> None:
    save_random(*PACKED[name], tmp_path)
    policy = assert_exact(tmp_path, full_logps)
    assert policy.packs
    with torch.no_grad():
        batch = pack(groups())
        right = policy.batch_logps(batch)
        # The same rows, the other sequences cut off from their prefix: were this equal, nothing was tested.
        segments = tuple(Segment(s.start, s.stop, s.start, s.start) for s in batch.model_kwargs["segments"])
        batch.model_kwargs["segments"] = segments
        assert (policy.batch_logps(batch) - right).abs().max() > 0.05


@pytest.mark.parametrize("name", PADDED)
def test_models_whose_prefix_cannot_be_shared_use_padded_rows_and_are_exact(
    tmp_path: Path, full_logps: FullLogps, name: str
) -> None:
    save_random(*PADDED[name], tmp_path)
    policy = assert_exact(tmp_path, full_logps)
    assert not policy.packs


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_reproduced_are_refused(tmp_path: Path, name: str) -> None:
    save_random(*REFUSED[name], tmp_path)
    with pytest.raises(ConfigError, match="cannot be reproduced from its hidden states") as caught:
        load(tmp_path)
    assert "supported architecture" in str(caught.value)


def test_the_chosen_completion_does_not_reach_the_rejected_one(policy: Policy) -> None:
    prompt, chosen, rejected = (np.array(ids, dtype=np.int32) for ids in ([0, 7, 8], [9, 10, 11], [12, 13]))
    other = np.array([14, 15, 16], dtype=np.int32)
    with torch.no_grad():
        first, second = (
            policy.sequence_logps([(TokenSequence(prompt, c), TokenSequence(prompt, rejected))])
            for c in (chosen, other)
        )
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], second[0])


def test_batch_composition_does_not_matter(policy: Policy) -> None:
    with torch.no_grad():
        together = policy.sequence_logps(groups())
        alone = [logps for group in groups() for logps in policy.sequence_logps([group])]
    for mine, exact in zip(together, alone, strict=True):
        torch.testing.assert_close(mine, exact, rtol=0, atol=1e-5)


def test_bins_of_padded_models_count_the_padding(policy: Policy) -> None:
    padded = Policy(policy.model, CPU, torch.float32, packs=False)
    long_and_short = [groups()[1], *[groups()[2]] * 6]
    # 2 x 41 rows, then 2 x 6 each: 82 + 72 without padding, 14 x 41 with it.
    assert len(policy.bins(long_and_short, 160)) == 1
    assert padded.bins(long_and_short, 160) == [[0], [1, 2, 3, 4, 5, 6]]


def test_dropout_is_off(tmp_path: Path, full_logps: FullLogps) -> None:
    save_random("LlamaConfig", {**HEADS, "attention_dropout": 0.5}, tmp_path)
    assert_exact(tmp_path, full_logps)


def test_bf16_computes_on_fp32_masters(tiny_model: Path) -> None:
    exact = load(tiny_model).sequence_logps(groups())
    policy = load(tiny_model, dtype=torch.bfloat16)
    found = policy.sequence_logps(groups())
    contrast(found).backward()
    assert policy.packs
    for parameter in policy.model.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
    difference = (torch.cat(found) - torch.cat(exact)).abs()
    assert 1e-4 < difference.max() < 0.2


def test_a_frozen_bf16_model_packs_and_takes_no_gradient(tiny_model: Path) -> None:
    policy = load(tiny_model, dtype=torch.bfloat16, trainable=False)
    assert policy.packs
    assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16}
    found = policy.sequence_logps(groups())
    assert not found[0].requires_grad
    exact = torch.cat(load(tiny_model).sequence_logps(groups()))
    assert 1e-4 < (torch.cat(found) - exact).abs().max() < 0.5


def test_the_head_is_the_models_own_parameter(tmp_path: Path) -> None:
    save_random("LlamaConfig", {**HEADS, "tie_word_embeddings": True}, tmp_path)
    model = load(tmp_path).model
    assert head_of(model).weight is model.get_input_embeddings().weight


def test_dtype_auto_is_fp32_on_a_cpu_and_bf16_on_a_gpu() -> None:
    assert compute_dtype("auto", CPU) == torch.float32
    assert compute_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert compute_dtype("bfloat16", CPU) == torch.bfloat16


def test_an_unknown_architecture_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no-such-model"}))
    with pytest.raises(ConfigError, match="transformers cannot load the model"):
        load(folder)


def test_a_checkpoint_without_all_weights_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"lacks 1 of the model's weights, such as model\.layers\.1\.mlp\.up"
    ):
        load(folder)
