"""Edits of a model's folder: of values in its JSON files, and of tensors."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


def change_config(folder: Path, **values: Any) -> None:
    """Set values of config.json."""
    change_json(folder / "config.json", lambda found: found.update(values))


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Let ``change`` edit the object that a file holds."""
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Let ``change`` edit the tensors of ``model.safetensors``, by name."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def lose_a_merge(folder: Path) -> None:
    """Make it another tokenizer with the same vocabulary."""
    change_json(folder / "tokenizer.json", lambda found: found["model"]["merges"].pop())


def touched(folder: Path) -> None:
    """Give its files another time, and nothing else."""
    for path in folder.iterdir():
        os.utime(path, ns=(1, 1))
