"""A model's config.json as transformers reads it, with what is wrong in it said in one sentence."""

from pathlib import Path
from typing import Any

from dpo_opt.schemas.errors import ConfigError, first_line


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
