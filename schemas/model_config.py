"""A model's config.json as transformers reads it, with what is wrong in it said in one sentence."""

from pathlib import Path
from typing import Any

from dpo_opt.schemas.errors import ConfigError


def load_model_config(folder: Path) -> Any:
    """The configuration, as a transformers object; no code of the folder is run.

    Raises:
        ConfigError: transformers does not know this kind of model, or a value cannot be what it is.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except model_errors() as error:
        raise ConfigError(
            f"transformers cannot make this model ({first_line(error)})",
            where=str(folder / "config.json"),
            why="its log-probs would be another model's, or nobody's",
            fix="correct that value, or copy the model's own config.json again",
        ) from error


def model_errors() -> tuple[type[Exception], ...]:
    """What transformers raises for a folder that it cannot make a model of; it checks few values by name."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    return (
        *(OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError),
        *(ArithmeticError, ImportError, RuntimeError, SafetensorError, StrictDataclassError),
    )


def first_line(error: Exception) -> str:
    """What an error says, short enough for a line, with its kind where that is half of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2])[:200]
    plain = isinstance(error, OSError | ValueError | RuntimeError | ImportError)
    return text if plain and text else f"{type(error).__name__}: {text}" if text else type(error).__name__
