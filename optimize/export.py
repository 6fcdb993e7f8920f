"""The trained model as a folder that transformers and vLLM load: weights, tokenizer, template, card."""

import shutil
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
    model = policy.model
    # The segment attention exists in this program only; the saved config must not ask for it.
    if policy.packs:
        model.set_attn_implementation("sdpa")
    # transformers refuses to write generation settings that it was willing to read (a temperature without
    # do_sample, as in many released models), which would lose the run at its very end: copied instead.
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.to(dtype=dtype)
    settings = source / "generation_config.json"
    with publish_folder(path) as private:
        model.save_pretrained(private, safe_serialization=True)
        shutil.copytree(tokenizer_dir, private, dirs_exist_ok=True)
        if settings.is_file():
            shutil.copyfile(settings, private / settings.name)
        (private / "README.md").write_text(card, encoding="utf-8")
