"""Weights that a model would leave out, found from the names in a checkpoint before an engine starts.

vLLM passes over what it has no place for: biases that config.json does not mention are skipped in silence.
Names in a file are not those of the model (transformers renames and joins tensors as it loads them), so they
are not compared: transformers loads the folder onto the ``meta`` device, which has shapes and no data, and
reports.
"""

from pathlib import Path
from typing import Any

from dpo_opt.schemas.models import read_config
from dpo_opt.schemas.weights import refuse_left_over


def require_place_for_all_weights(folder: Path) -> None:
    """Refuse a checkpoint that holds weights which its model class does not have. Reads no weights.

    Nothing is known, and nothing refused, where transformers does not know the class or cannot make it, where
    the weights are quantized (only their own library knows their names), and without accelerate.

    Raises:
        ConfigError: It does.
    """
    refuse_left_over(_unexpected_keys(folder), folder=folder)


def _unexpected_keys(folder: Path) -> list[str]:
    from transformers.utils import is_accelerate_available, logging

    if not is_accelerate_available() or "quantization_config" in read_config(folder):
        return []
    verbosity = logging.get_verbosity()
    # Its report is a table; its bars would stand between ours.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        _, report = _class(folder).from_pretrained(
            folder,
            device_map="meta",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, AttributeError):
        return []  # the engine may know better, and says what is wrong
    finally:
        logging.set_verbosity(verbosity)
    return list(report["unexpected_keys"])


def _class(folder: Path) -> Any:
    """The class that config.json names, as vLLM chooses its own by it; without a name, that for text."""
    import transformers

    named = (read_config(folder).get("architectures") or [None])[0]
    return transformers.AutoModelForCausalLM if named is None else getattr(transformers, str(named))
