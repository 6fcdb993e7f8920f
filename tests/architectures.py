"""Small models of many architectures with random weights, and sequences that would show a wrong mask."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpo_opt.optimize.forward.load_policy import load_policy
from dpo_opt.optimize.forward.packing import Group
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.schemas.pairs import TokenSequence

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
    # At the published cap of 50, random weights would not show that it is left out.
    "gemma2-softcapped": (
        "Gemma2Config",
        {**HEADS, "sliding_window": WINDOW, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 16},
    ),
    "gpt-oss-sinks": (
        "GptOssConfig",
        {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    ),
}

PADDED: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon-h1": ("FalconH1Config", {**SIZES, **STATES, "mamba_d_ssm": 128, "lm_head_multiplier": 0.5}),
    "recurrent-gemma": (
        "RecurrentGemmaConfig",
        {
            **{k: v for k, v in SIZES.items() if k != "max_position_embeddings"},
            "lru_width": 64,
            "attention_window_size": 25,
            "logits_soft_cap": 3.0,
        },
    ),
    "llama4-chunked": (
        "Llama4TextConfig",
        {**HEADS, "intermediate_size_mlp": 96, "num_local_experts": 4, "attention_chunk_size": 25},
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


def save_random(kind: str, sizes: dict[str, Any], folder: Path, *, seed: int = 0) -> None:
    """Weights large enough that every token has its own log-prob: a wrong mask would show."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**sizes)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)


def load(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    trainable: bool = True,
    param_dtype: torch.dtype | None = torch.float32,
) -> Policy:
    return load_policy(folder, dtype=dtype, device=CPU, trainable=trainable, param_dtype=param_dtype)


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
