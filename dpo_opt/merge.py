"""An adapter merged into its base: one model that is scored, served and trained like any other."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_opt.schemas.errors import ConfigError, quoted
from dpo_opt.schemas.models import find_model
from dpo_opt.schemas.progress import Progress, Silent
from dpo_opt.schemas.storage import publish_folder

if TYPE_CHECKING:
    from dpo_opt.commands.merge import MergeConfig

# Neighbours in bf16 are 1/128 apart or less, relative to a weight; a change below half of that vanishes.
_MUCH = 0.1


def merge(config: "MergeConfig", *, progress: Progress | None = None) -> dict[str, Any]:
    """Write the merged model, whole or not at all; the base's tokenizer and settings go with it.

    Merging the same adapter again gives the same bits, so a reference that was scored with one merged copy
    is recognised by ``dpo-opt train --adapter``.

    Returns:
        ``output``, ``layers`` (how many had an adapter), ``rank``, and ``lost``: the share of the adapter's
        change that rounding took away (norm of the error over norm of the change).

    Raises:
        ConfigError: The output folder is used, or the adapter is not plain LoRA or is for another base.
        DataError: The adapter's files are damaged.
    """
    import torch

    from dpo_opt.optimize.adapters.adapter_folder import read_adapter, require_base
    from dpo_opt.optimize.adapters.merging import write_merged

    if config.output.exists() and (not config.output.is_dir() or any(config.output.iterdir())):
        raise ConfigError(
            f"the output folder {quoted(config.output)} is already in use",
            fix="pass another --output, or remove the folder",
        )
    progress = progress or Silent()
    base = find_model(config.model)
    adapter = read_adapter(config.adapter)
    require_base(adapter, base)
    with publish_folder(config.output) as private:
        dtype = None if config.dtype == "auto" else torch.float32
        lost = write_merged(base, adapter, private, dtype=dtype, progress=progress)
        (private / "README.md").write_text(_card(config), encoding="utf-8")
    if lost > _MUCH:
        progress.say(
            f"rounding to the base's dtype lost {lost:.0%} of the adapter's change; --dtype float32 keeps "
            "it, and so does serving the adapter beside its base"
        )
    return {
        "output": str(config.output),
        "layers": len(adapter.layers),
        "rank": adapter.rank,
        "lost": round(lost, 6),
    }


def _card(config: "MergeConfig") -> str:
    base = json.dumps(_public_name(config.model))
    return f"""---
library_name: transformers
base_model: {base}
tags: [dpo-opt]
---

# {config.output.name}

{_public_name(config.model)} with the LoRA adapter `{config.adapter.name}` merged into its weights by dpo-opt.
"""


def _public_name(model: str) -> str:
    """A Hub name as it is, of a path only the last part."""
    return Path(model).name if Path(model).expanduser().is_dir() else model
