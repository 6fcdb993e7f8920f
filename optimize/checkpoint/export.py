"""Writes a policy as a folder that transformers and vLLM load: weights, tokenizer, settings, model card."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, modeling_utils

from dpo_opt.optimize.checkpoint.tensor_file import write_tensors
from dpo_opt.optimize.forward.architecture import decoder_of
from dpo_opt.optimize.forward.attention import STOCK_ATTENTION
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.schemas.model_config import load_model_config
from dpo_opt.schemas.plain_data import json_of
from dpo_opt.schemas.rope import PINNED
from dpo_opt.schemas.tokenizer_files import copy_tokenizer

# Settings of image, sound and video processors. The tokenizer and its template are copied separately.
_PROCESSORS = ("*processor_config.json", "*processor.json", "audio_tokenizer*.json")
_TEMPLATE = "chat_template.*"
_TEMPLATE_SETTING = "chat_template"


def write_model(
    policy: Policy, folder: Path, *, source: Path, tokenizer_dir: Path, card: str
) -> dict[str, str]:
    """Write a policy into a folder, in its own dtype.

    Args:
        policy: The trained policy.
        folder: An empty folder.
        source: The folder it was loaded from; its generation settings and its processor are copied.
        tokenizer_dir: The tokenizer that made the training data; its files are copied, byte for byte.
        card: Text of the model card.

    Returns:
        Hex SHA-256 of each file of weights, by name.
    """
    model = policy.model
    # transformers refuses to write some generation settings that it reads (a temperature without do_sample, a
    # pad_token_id of -1, as in many released models). That would lose the run at its very end, so the file of
    # the source is copied instead.
    model.generation_config = GenerationConfig()
    settings = source / "generation_config.json"
    with _as_it_was_loaded(policy, source), _hashing() as hashes:
        model.save_pretrained(folder, safe_serialization=True)
    (folder / settings.name).unlink(missing_ok=True)
    copy_tokenizer(tokenizer_dir, folder)
    if settings.is_file():
        shutil.copyfile(settings, folder / settings.name)
    _copy_processor(source, folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return hashes


@contextlib.contextmanager
def _hashing() -> Iterator[dict[str, str]]:
    """Meanwhile transformers hashes the weights that it writes; yields their hashes by name of the file."""
    hashes: dict[str, str] = {}

    def save(tensors: Mapping[str, Tensor], name: str, metadata: Mapping[str, str]) -> None:
        hashes[Path(name).name] = write_tensors(Path(name), tensors, metadata)

    # Only transformers knows how a model's weights are named and split in files.
    own = modeling_utils.safe_save_file
    modeling_utils.safe_save_file = save
    try:
        yield hashes
    finally:
        modeling_utils.safe_save_file = own


def _copy_processor(source: Path, folder: Path) -> None:
    """Copy the processor's files: a vision or audio model does not load without them."""
    # Another template would count before the tokenizer's own, which is the one that was trained on; and
    # transformers refuses a folder with two.
    templated = any(folder.glob(_TEMPLATE)) or _TEMPLATE_SETTING in _settings(folder)
    for pattern in (*_PROCESSORS, *(() if templated else (_TEMPLATE,))):
        for path in source.glob(pattern):
            if path.is_file() and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    found: dict[str, Any] = json_of(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


@contextlib.contextmanager
def _as_it_was_loaded(policy: Policy, source: Path) -> Iterator[None]:
    """Meanwhile the config names transformers' own attention and the original rotary embedding."""
    decoder = decoder_of(policy.model)
    text, original = policy.model.config.get_text_config(), load_model_config(source).get_text_config()
    own = {name: getattr(text, name) for name in PINNED if hasattr(text, name)}
    attention = text._attn_implementation
    decoder.set_attn_implementation(STOCK_ATTENTION)
    try:
        for name in own:
            setattr(text, name, getattr(original, name))
        yield
    finally:
        for name, value in own.items():
            setattr(text, name, value)
        decoder.set_attn_implementation(attention)
