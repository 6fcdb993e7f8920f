"""What bench/gpu.py trains: models by shape, made-up pairs by length, and the FLOPs they are worth."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from dpo_opt.schemas.pairs import TokenizedPair

_LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip


def _qwen(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 2, "vocab_size": 151936,
        "tie_word_embeddings": True,
    }  # fmt: skip


_LLAMA_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("Qwen2Config", _qwen(64, 128, 2, 4) | {"vocab_size": 512}),
    "0.5b": ("Qwen2Config", _qwen(896, 4864, 24, 14)),
    "1b": ("LlamaConfig", _LLAMA_1B),
    "1.5b": ("Qwen2Config", _qwen(1536, 8960, 28, 12)),
    "3b": ("Qwen2Config", _qwen(2048, 11008, 36, 16)),
    "8b": ("LlamaConfig", _LLAMA_8B),
}
# With fp32 parameters, gradients and moments these take more than a card has.
_BF16_PARAMETERS = {"8b"}
# Medians and spread (of the logarithm) of tokens in HH-RLHF's prompts and completions.
_HH = {"prompt": (86, 1.05), "completion": (30, 1.0)}
_HH_LONGEST = 1024
# Ids in use: every shape has them, and TRL's tokenizer here knows them. The first two end and pad.
WORDS = 500
END, PAD = 0, 1


class Task(NamedTuple):
    """What every contender of a table section trains."""

    config: PreTrainedConfig
    pairs: list[TokenizedPair]
    """Those of the step that is not counted, then those of the counted ones."""
    per_step: int
    device: torch.device
    dtype: torch.dtype
    """Of computing."""
    param_dtype: torch.dtype

    @property
    def steps(self) -> list[list[TokenizedPair]]:
        """The pairs of each step."""
        return [self.pairs[i : i + self.per_step] for i in range(0, len(self.pairs), self.per_step)]


def make_task(
    shape: str, mix: str, *, steps: int, per_step: int, device: torch.device, dtype: torch.dtype
) -> Task:
    """A shape of ``SHAPES`` on pairs of a mix (``made_up_pairs``)."""
    param_dtype = torch.bfloat16 if shape in _BF16_PARAMETERS else torch.float32
    return Task(config_of(shape), made_up_pairs(mix, per_step * steps), per_step, device, dtype, param_dtype)


def config_of(shape: str) -> PreTrainedConfig:
    """By name of ``SHAPES``."""
    name, sizes = SHAPES[shape]
    return getattr(transformers, name)(**sizes, max_position_embeddings=8192, use_cache=False)


def made_up_pairs(mix: str, count: int) -> list[TokenizedPair]:
    """Random ids; both completions end with the same token, as real ones do.

    Args:
        mix: ``P/C/R`` in tokens, or ``hh-like``.
        count: How many pairs.
    """
    rng = np.random.default_rng(0)

    def length(part: str) -> int:
        median, spread = _HH[part]
        return int(np.clip(rng.lognormal(math.log(median), spread), 4, _HH_LONGEST))

    def ids(tokens: int, *, ends: bool) -> np.ndarray:
        words = rng.integers(2, WORDS, size=tokens).astype(np.int32)
        if ends:
            words[-1] = END
        return words

    pairs = []
    for row in range(count):
        if mix == "hh-like":
            lengths = [length("prompt"), length("completion"), length("completion")]
        else:
            lengths = [int(part) for part in mix.split("/")]
        prompt, chosen, rejected = (ids(n, ends=i > 0) for i, n in enumerate(lengths))
        pairs.append(
            TokenizedPair(row=row, source=None, prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected)
        )
    return pairs


def model_flops(config: PreTrainedConfig, *pairs: TokenizedPair) -> float:
    """Forward and backward of pairs, each prompt counted once; recomputation is not counted."""
    per_token = 6 * linear_parameters(config)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    per_key = 12 * width * config.num_hidden_layers
    per_scored = 6 * config.hidden_size * config.vocab_size
    total = 0.0
    for pair in pairs:
        prompt, chosen, rejected = len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)
        attended = ((prompt + chosen) ** 2 + (prompt + rejected) ** 2 - prompt**2) / 2
        total += per_token * (prompt + chosen + rejected) + per_key * attended
        total += per_scored * (chosen + rejected)
    return total


def make_model(task: Task, attention: str) -> PreTrainedModel:
    """Random weights, the same for every contender."""
    torch.manual_seed(0)
    with task.device:
        model = AutoModelForCausalLM.from_config(
            task.config, dtype=task.param_dtype, attn_implementation=attention
        )
    return model.eval()


def parameters_of(config: PreTrainedConfig) -> dict[str, Tensor]:
    """By name, without memory behind them."""
    with torch.device("meta"):
        return dict(AutoModelForCausalLM.from_config(config).named_parameters())


def linear_parameters(config: PreTrainedConfig) -> int:
    """Weights of matrix products, without embeddings and head."""
    return sum(p.numel() for name, p in parameters_of(config).items() if ".layers." in name and p.ndim == 2)
