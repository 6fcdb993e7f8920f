"""vLLM, the transformers scorer and the trainer's gate on the same model: random weights of many
architectures, at and around the context that each was made for.
"""

import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import CPU, EXPERTS, save_random
from engine_apart import score_in_vllm

from dpo_opt.optimize.forward.load_policy import load_policy
from dpo_opt.optimize.measure_parity import measure_parity
from dpo_opt.optimize.transformers_scorer import HfScorer
from dpo_opt.precompute.engine.score_pairs import score_pairs
from dpo_opt.schemas.pairs import TokenizedPair

VOCABULARY = 512
CONTEXT = 64
WINDOW = 16
HEAD = 32  # vLLM's attention on a CPU refuses smaller ones
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS: dict[str, Any] = {**SIZES, "head_dim": HEAD}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0] * 8 + [1.5] * 8,
    "long_factor": [1.0] * 4 + [9.0] * 12,
}
ONE_LENGTH: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", HEADS),
    "qwen2": ("Qwen2Config", SIZES),
    "qwen3": ("Qwen3Config", HEADS),
    "qwen3-moe": ("Qwen3MoeConfig", {**HEADS, **EXPERTS, "moe_intermediate_size": 64}),
    "mistral-windowed": ("MistralConfig", {**HEADS, "sliding_window": WINDOW}),
    "gemma2-softcapped": (
        "Gemma2Config",
        {**HEADS, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": HEAD},
    ),
    "gemma3-windowed": (
        "Gemma3TextConfig",
        {**HEADS, "sliding_window": WINDOW, "query_pre_attn_scalar": HEAD},
    ),
    "phi3": ("Phi3Config", SIZES),
    "gpt-neox": (
        "GPTNeoXConfig",
        {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "pad_token_id")},
    ),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 128,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": CONTEXT,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "granite-scaled": ("GraniteConfig", {**SIZES, "logits_scaling": 4.0, "attention_multiplier": 0.2}),
    "olmo2": ("Olmo2Config", SIZES),
    "olmo3-windowed": ("Olmo3Config", {**SIZES, "sliding_window": WINDOW}),
    "opt": (
        "OPTConfig",
        {
            **{k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "intermediate_size")},
            "ffn_dim": 192,
            "word_embed_proj_dim": 128,
        },
    ),
    "cohere-scaled": ("CohereConfig", {**SIZES, "logit_scale": 0.25}),
    "starcoder2": ("Starcoder2Config", SIZES),
    "gpt-oss-sinks": (
        "GptOssConfig",
        {
            **HEADS,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "rope_scaling": None,
        },
    ),
}
# The context is longer than the one the model was made for, and the lengths stand around that one.
SCALED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": (
        "LlamaConfig",
        {
            **HEADS,
            "max_position_embeddings": 4 * CONTEXT,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": CONTEXT,
            },
        },
    ),
    "yarn": (
        "LlamaConfig",
        {
            **HEADS,
            "max_position_embeddings": 4 * CONTEXT,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": CONTEXT,
            },
        },
    ),
    "linear": ("LlamaConfig", {**HEADS, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "dynamic": ("LlamaConfig", {**HEADS, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
    "longrope": (
        "Phi3Config",
        {
            **SIZES,
            "max_position_embeddings": 4 * CONTEXT,
            "original_max_position_embeddings": CONTEXT,
            "rope_scaling": LONGROPE,
        },
    ),
}
CASES = [
    *((name, settings, CONTEXT) for name, settings in ONE_LENGTH.items()),
    *(
        (name, settings, CONTEXT + beyond)
        for name, settings in SCALED.items()
        # What depends on the position alone is the same in all three runs.
        for beyond in ((-1, 0, 1) if name in ("dynamic", "longrope") else (1,))
    ),
]


# vLLM runs these through transformers' class, which it changes, or needs groups of processes that it makes
# once: no other engine may have been in their process.
WITHOUT_A_CLASS = {"gpt-neox", "olmo2", "olmo3-windowed", "starcoder2", "gpt-oss-sinks"}


def one_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))


@pytest.fixture(scope="module")
def engines() -> Iterator[ProcessPoolExecutor]:
    with one_process() as found:
        yield found


def pairs_up_to(longest: int) -> list[TokenizedPair]:
    """Short ones, and some of exactly the longest length, one below and two below."""
    rng = np.random.default_rng(0)

    def ids(count: int) -> np.ndarray:
        return rng.integers(3, VOCABULARY, size=count).astype(np.int32)

    lengths = [(7, 5, 6), (12, 9, 4), (30, 8, 8), *((20, longest - 20 - less, 11) for less in (0, 1, 2))]
    return [
        TokenizedPair(
            row=row,
            source=None,
            prompt_ids=ids(prompt),
            chosen_ids=ids(chosen),
            rejected_ids=ids(rejected),
            chosen_truncated=False,
            rejected_truncated=False,
        )
        for row, (prompt, chosen, rejected) in enumerate(lengths)
    ]


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "settings", "longest"), CASES, ids=[f"{n}-{m}" for n, _, m in CASES])
def test_all_agree(
    engines: ProcessPoolExecutor,
    tiny_model: Path,
    tmp_path: Path,
    name: str,
    settings: tuple[str, dict[str, Any]],
    longest: int,
) -> None:
    save_random(*settings, tmp_path)
    for file in tiny_model.glob("tokenizer*"):
        shutil.copyfile(file, tmp_path / file.name)  # vLLM wants one, though it is given ids
    pairs = pairs_up_to(longest)
    stock = HfScorer(tmp_path, dtype="float32", max_length=longest)
    if name in WITHOUT_A_CLASS:
        with one_process() as apart:
            rope, in_vllm = apart.submit(score_in_vllm, tmp_path, pairs, longest).result()
    else:
        rope, in_vllm = engines.submit(score_in_vllm, tmp_path, pairs, longest).result()
    assert rope == stock.numerics.rope
    scored = {"vllm": in_vllm, "transformers": score_pairs(pairs, stock).pairs}
    policy = load_policy(tmp_path, dtype=torch.float32, device=CPU, trainable=True, max_length=longest)
    for name_of_engine, cached in scored.items():
        parity = measure_parity(policy, cached, cached_dtype="float32")
        print(
            f"{name} at most {longest} tokens, {name_of_engine} minus trainer: mean {parity.mean:+.1e}, "
            f"sd {parity.sd:.1e}, max {parity.max:.1e}"
        )
        assert parity.ok
        assert abs(parity.mean) < 1e-4
        assert parity.max < 5e-3
