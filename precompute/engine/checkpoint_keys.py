"""Refuses a checkpoint with weights that the model class would leave out, before an engine starts.

vLLM silently skips weights that it has no place for, such as biases that config.json does not mention. The
names in a file are not the model's names, because transformers renames and joins tensors as it loads them. So
transformers loads the folder onto the ``meta`` device, which has shapes but no data, and reports the names
that are left over.
"""

from pathlib import Path
from typing import Any

from dpo_opt.schemas.models import read_config
from dpo_opt.schemas.weights import refuse_left_over


def require_place_for_all_weights(folder: Path) -> None:
    """Refuse a checkpoint that holds weights which its model class does not have. Reads no weights.

    Nothing is checked if transformers does not know the class or cannot build it, if the weights are
    quantized (only the quantization library knows their names), or without accelerate.

    Raises:
        ConfigError: The checkpoint holds such weights.
    """
    refuse_left_over(_unexpected_keys(folder), folder=folder)


def _unexpected_keys(folder: Path) -> list[str]:
    from transformers.utils import logging
    from transformers.utils.import_utils import is_accelerate_available

    if not is_accelerate_available() or "quantization_config" in read_config(folder):
        return []
    verbosity = logging.get_verbosity()
    # transformers would print its report as a table, and progress bars among ours.
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
        return []  # the engine may know the model; if not, its error says what is wrong
    finally:
        logging.set_verbosity(verbosity)
    return list(report["unexpected_keys"])


def _class(folder: Path) -> Any:
    """The class that config.json names, by which vLLM chooses its own; without a name, the one for text."""
    import transformers

    named = (read_config(folder).get("architectures") or [None])[0]
    return transformers.AutoModelForCausalLM if named is None else getattr(transformers, str(named))
