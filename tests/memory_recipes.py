"""Which settings train which model on which GPU: the table of ``docs/memory.md``.

``python tests/memory_recipes.py`` counts it and writes the page again. Of a model only its sizes are needed.
They are those of its published config.json.
"""

import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from fakes import scored_pairs

from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.memory.advice import fits
from dpo_opt.optimize.memory.count import count_memory
from dpo_opt.optimize.memory.gpus import parse_gpus

PAGE = Path(__file__).resolve().parents[1] / "docs" / "memory.md"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3.1-8B": (
        "LlamaConfig",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
        },
    ),
    "Qwen3-4B": (
        "Qwen3Config",
        {
            "vocab_size": 151936,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen2.5-7B": (
        "Qwen2Config",
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
        },
    ),
}
SHORT, LONG = (512, 1536, 1536), (1024, 31744, 31744)
_NARROW = "--param-dtype bfloat16"
_EIGHT_BIT = "--optim adamw-8bit"
_RECOMPUTED = "--activation-checkpointing full"


class Recipe(NamedTuple):
    """A run with one pair in each of a step's micro-batches."""

    model: str
    gpus: str
    lengths: tuple[int, int, int]
    """Tokens of prompt, chosen and rejected."""
    options: tuple[str, ...]


RECIPES = (
    Recipe("Llama-3.1-8B", "1xH100-80GB", SHORT, ()),
    Recipe("Llama-3.1-8B", "1xH100-80GB", SHORT, (_NARROW, _RECOMPUTED)),
    Recipe("Llama-3.1-8B", "1xH100-80GB", SHORT, (_NARROW, _EIGHT_BIT)),
    Recipe("Llama-3.1-8B", "2xH100-80GB", SHORT, (_RECOMPUTED,)),
    Recipe("Llama-3.1-8B", "4xH100-80GB", SHORT, ()),
    Recipe("Qwen3-4B", "1xA100-40GB", SHORT, (_NARROW, _RECOMPUTED)),
    Recipe("Qwen3-4B", "1xA100-40GB", SHORT, (_NARROW, _EIGHT_BIT, _RECOMPUTED)),
    Recipe("Qwen3-4B", "1xH100-80GB", SHORT, (_RECOMPUTED,)),
    Recipe("Qwen2.5-7B", "1xH100-80GB", LONG, ("--use-peft", _RECOMPUTED)),
    Recipe("Qwen2.5-7B", "1xL4-24GB", SHORT, ("--use-peft", _RECOMPUTED)),
)


def line(recipe: Recipe) -> str:
    """A recipe and what was counted, as a row of the table."""
    gpus = parse_gpus(recipe.gpus)
    settings = {}
    for option in recipe.options:
        name, _, value = option.removeprefix("--").partition(" ")
        settings[name.replace("-", "_")] = value or True
    config = TrainConfig.model_validate({"shards": "S", "model": "M", "output_dir": "R"} | settings)
    kind, sizes = MODELS[recipe.model]
    with tempfile.TemporaryDirectory() as folder:
        getattr(transformers, kind)(**sizes).save_pretrained(folder)
        # Two micro-batches of each process: gradients are kept while the second runs.
        pairs = scored_pairs(*[recipe.lengths] * 2 * gpus.number)
        memory = count_memory(config, Path(folder), pairs, rows=1, device=gpus.device, processes=gpus.number)
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations or 0, memory.head)
    return (
        f"{_start(recipe)} {' | '.join(f'{part / 1e9:.1f}' for part in parts)} "
        f"| **{memory.total / 1e9:.1f}** | {'yes' if fits(memory, gpus) else 'no'} |"
    )


def _start(recipe: Recipe) -> str:
    prompt, chosen, _ = recipe.lengths
    options = " ".join(recipe.options)
    return (
        f"| {recipe.model}, 2 x {prompt + chosen:,} tokens | {recipe.gpus} "
        f"| {f'`{options}`' if options else 'the defaults'} |"
    )


def written(recipe: Recipe, page: str) -> str | None:
    """The recipe's row on the page; None where there is none."""
    found = re.search(rf"^{re.escape(_start(recipe))}.*$", page, re.M)
    return found[0] if found else None


if __name__ == "__main__":
    before = PAGE.read_text(encoding="utf-8")
    rows = "\n".join(line(recipe) for recipe in RECIPES)
    after = re.sub(r"(?<=\| fits \|\n)(\|-.*\n)(\|.*\n)+", rf"\1{rows}\n", before)
    PAGE.write_text(after, encoding="utf-8")
