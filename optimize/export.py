"""A policy as a folder that transformers and vLLM load: weights, tokenizer, template, settings, card."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import GenerationConfig

from dpo_opt.optimize.policy import Policy
from dpo_opt.schemas.storage import publish_folder


def save_final(
    policy: Policy, path: Path, *, source: Path, dtype: torch.dtype, tokenizer_dir: Path, card: str
) -> None:
    """Write the folder whole or not at all. The policy's parameters are cast in place.

    Args:
        policy: What was trained.
        path: Folder to make.
        source: The folder it was loaded from; its generation settings are kept.
        dtype: Dtype of the weights on disk.
        tokenizer_dir: The tokenizer whose ids were trained on.
        card: Text of the model card.
    """
    policy.model.to(dtype=dtype)
    with publish_folder(path) as private:
        write_model(policy, private, source=source, tokenizer_dir=tokenizer_dir, card=card)


def write_model(policy: Policy, folder: Path, *, source: Path, tokenizer_dir: Path, card: str) -> None:
    """Put a policy as it is into a folder; arguments as in ``save_final``."""
    model = policy.model
    # transformers refuses to write generation settings that it was willing to read (a temperature without
    # do_sample, as in many released models), which would lose the run at its very end: copied instead.
    model.generation_config = GenerationConfig.from_model_config(model.config)
    settings = source / "generation_config.json"
    with _stock_attention(policy):
        model.save_pretrained(folder, safe_serialization=True)
    shutil.copytree(tokenizer_dir, folder, dirs_exist_ok=True)
    if settings.is_file():
        shutil.copyfile(settings, folder / settings.name)
    (folder / "README.md").write_text(card, encoding="utf-8")


@contextlib.contextmanager
def _stock_attention(policy: Policy) -> Iterator[None]:
    """The segment attention exists in this program only; a saved config must not ask for it."""
    own = policy.model.config._attn_implementation
    if policy.packs:
        policy.model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        policy.model.set_attn_implementation(own)
