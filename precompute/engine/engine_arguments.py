"""The arguments that vLLM's engine is started with: fixed ones, defaults, and the user's --engine-option."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_opt.precompute.engine.vllm_build import is_cpu_build
from dpo_opt.schemas.rope import pin_rope

# Logits of one engine step are (rows, V) in fp32: 2048 rows of a 150k vocabulary take 1.2 GB.
_STEP_TOKENS = 2048
# Prompt log-probs take GPU memory that vLLM does not count, in addition to weights and cache.
_GPU_MEMORY_UTILIZATION = 0.85
_CPU_KV_CACHE_BYTES = 2 * 2**30
_CPU_BLOCK = 32


def engine_arguments(
    folder: Path,
    *,
    dtype: str,
    max_length: int,
    reuse: bool,
    fixes_rope: bool,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """All arguments of an engine.

    Args:
        folder: The model folder.
        dtype: Dtype of weights and computation; vLLM's ``auto`` would load an fp32 checkpoint in half
            precision.
        max_length: Longest sequence that will be scored, in tokens.
        reuse: Whether a prompt's cache serves all of its completions.
        fixes_rope: Whether a rotary embedding depends on the sequence's length and is fixed for the run
            (``schemas.rope``).
        options: The user's own arguments.
    """
    found = {**_defaults(options, max_length), **options}
    if fixes_rope:
        others = options.get("hf_overrides", {})
        found["hf_overrides"] = functools.partial(_with_fixed_rope, max_length=max_length, others=others)
    return {
        **found,
        "model": str(folder),
        "dtype": dtype,
        # One token is sampled after the longest sequence.
        "max_model_len": max_length + 1,
        "enable_prefix_caching": reuse,
        "load_format": "safetensors",
        "trust_remote_code": False,
        # The model's own log-probs: no temperature, no penalty, no generation defaults of the checkpoint.
        "logprobs_mode": "raw_logprobs",
        "generation_config": "vllm",
        "disable_log_stats": True,
        "seed": 0,
    }


def accepted_arguments() -> set[str]:
    """Names of the arguments that the installed engine accepts. Imports vLLM."""
    from vllm.engine.arg_utils import EngineArgs

    return {field.name for field in dataclasses.fields(EngineArgs)}


def _defaults(options: Mapping[str, Any], max_length: int) -> dict[str, Any]:
    """Default arguments, which the user's options replace."""
    found: dict[str, Any] = {"max_num_batched_tokens": _STEP_TOKENS}
    if not is_cpu_build():
        return {**found, "gpu_memory_utilization": _GPU_MEMORY_UTILIZATION}
    # With the small models that a CPU can score, compiling takes longer than it saves.
    found |= {"block_size": _CPU_BLOCK, "enforce_eager": True}
    # A seeded request that is prefilled in two steps stops the engine: CPU generators have no offset to take
    # back. So each sequence is prefilled in one step, if the user's steps have room for it.
    found["max_num_batched_tokens"] = max(_STEP_TOKENS, max_length + 1)
    if options.get("max_num_batched_tokens", max_length + 1) > max_length:
        found["enable_chunked_prefill"] = False
    if "gpu_memory_utilization" not in options:
        found["kv_cache_memory_bytes"] = _CPU_KV_CACHE_BYTES
    return found


def _with_fixed_rope(config: Any, *, max_length: int, others: Mapping[str, Any]) -> Any:
    """The engine's configuration with a rotary embedding that is the same for the whole run."""
    pin_rope(config, max_length).update(dict(others))
    return config
