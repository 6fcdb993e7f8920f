"""A model on disk: where it is, whether it is safe to load, and what its content is called.

A path or a Hub name says nothing about content; these digests do. They read bytes only, so the stage
that plans a job needs no deep-learning library to know exactly which model it is about.
"""

import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.hub import fetch

# Saving a model again may change these without changing one log-prob.
_VOLATILE_CONFIG_KEYS = frozenset(
    {
        "_name_or_path",
        "_model_name_or_path",
        "architectures",
        "dtype",
        "id2label",
        "label2id",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def find_model(model: str, *, revision: str | None = None) -> Path:
    """Folder of a model's files: a local path, or a Hub name fetched at a pinned revision.

    Raises:
        ConfigError: There is no such folder, the Hub cannot provide it, or it is not safe to load.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _fetch(model, revision)
    _refuse_unsafe(folder)
    return folder


def _fetch(model: str, revision: str | None) -> Path:
    looks_local = model.startswith((".", "/", "~")) or model.count("/") != 1
    if looks_local:
        raise ConfigError(
            f"there is no model folder {model!r}",
            why="the reference is loaded from a folder with config.json and *.safetensors",
            fix="pass --model with an existing folder, or a Hub name such as organisation/model",
        )
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    return fetch(model, kind="model", revision=revision, patterns=patterns, extra="train")


def _refuse_unsafe(folder: Path) -> None:
    config_path = folder / "config.json"
    if not config_path.is_file() and (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{folder} is an adapter, not a model",
            why="it is a small change to another model, which it needs",
            fix=f"dpo-opt merge --model BASE --adapter {folder} --output MERGED, then pass MERGED",
        )
    if not config_path.is_file():
        raise ConfigError(
            f"{folder} has no config.json",
            why="it is not a model folder in the Hugging Face layout",
            fix="pass --model with a folder that save_pretrained wrote",
        )
    if "auto_map" in read_config(folder):
        raise ConfigError(
            f"{folder} asks to run its own Python code (auto_map in config.json)",
            why="loading it would execute code from the model folder",
            fix="use a model that transformers supports without remote code",
        )
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{folder} holds no *.safetensors weights",
            why="other weight formats are pickles, which can run code when loaded",
            fix="convert the model with save_pretrained(..., safe_serialization=True)",
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json.

    Raises:
        ConfigError: The file is not a JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"not readable as JSON ({error})", where=str(path)) from error
    if not isinstance(config, dict):
        raise ConfigError("not a JSON object", where=str(path))
    return config


def checkpoint_dtype(folder: Path) -> str:
    """The dtype the checkpoint declares, ``float32`` where it declares none."""
    config = read_config(folder)
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def context_length(folder: Path) -> int | None:
    """Most tokens a sequence may have, where the config states it."""
    value = read_config(folder).get("max_position_embeddings")
    return int(value) if value is not None else None


def config_digest(folder: Path) -> str:
    """SHA-256 of what config.json says about the computation; names and versions left out."""
    config = {k: v for k, v in read_config(folder).items() if k not in _VOLATILE_CONFIG_KEYS}
    return _sha256(json.dumps(config, sort_keys=True, separators=(",", ":")))


def weights_digest(folder: Path, *, contents: Mapping[str, tuple[str, str]] | None = None) -> str:
    """SHA-256 over every tensor's name, dtype, shape and bytes: the same for a re-sharded copy.

    Args:
        folder: In the Hugging Face layout.
        contents: By tensor name, the dtype (``BF16``) and SHA-256 of what is to stand in the tensor's place.

    Raises:
        ConfigError: A safetensors file is truncated or damaged.
    """
    others = contents or {}
    tensors = [t for path in sorted(folder.glob("*.safetensors")) for t in _tensors(path)]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        lines = sorted(pool.map(lambda t: _tensor_line(t, others.get(t[1])), tensors))
    return _sha256("\n".join(lines))


def _tensors(path: Path) -> list[tuple[Path, str, str, tuple[int, ...], int, int]]:
    """(file, name, dtype, shape, first byte, last byte) of each tensor, from the safetensors header."""
    size = path.stat().st_size
    damaged = ConfigError(
        "the safetensors file is truncated or damaged",
        where=str(path),
        fix="copy or download the model again",
    )
    with path.open("rb") as handle:
        prefix = handle.read(8)
        if len(prefix) < 8:
            raise damaged
        (header_size,) = struct.unpack("<Q", prefix)
        if header_size > size - 8:
            raise damaged
        header_bytes = handle.read(header_size)
    start = 8 + header_size
    found = []
    try:
        for name, entry in json.loads(header_bytes).items():
            if name != "__metadata__":
                begin, end = map(int, entry["data_offsets"])
                shape = tuple(map(int, entry["shape"]))
                found.append((path, name, str(entry["dtype"]), shape, start + begin, start + end))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged from error
    if any(not start <= begin <= end <= size for *_, begin, end in found):
        raise damaged
    return found


def _tensor_line(
    tensor: tuple[Path, str, str, tuple[int, ...], int, int], content: tuple[str, str] | None
) -> str:
    path, name, dtype, shape, begin, end = tensor
    if content is not None:
        return f"{name} {content[0]} {'x'.join(map(str, shape))} {content[1]}"
    digest = hashlib.sha256()
    if end > begin:
        with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            view = memoryview(data)
            try:
                digest.update(view[begin:end])
            finally:
                view.release()
    return f"{name} {dtype} {'x'.join(map(str, shape))} {digest.hexdigest()}"


def parameter_count(folder: Path) -> int:
    """Number of weights in a model's safetensors files, from their headers alone."""
    return sum(
        math.prod(shape)
        for path in sorted(folder.glob("*.safetensors"))
        for _, _, _, shape, _, _ in _tensors(path)
    )


class _Backend(Protocol):
    def to_str(self) -> str: ...


class FastTokenizer(Protocol):
    """The part of a transformers tokenizer that decides how text becomes ids."""

    backend_tokenizer: _Backend
    bos_token: str | None
    eos_token: str | None
    unk_token: str | None


def tokenizer_digest(tokenizer: FastTokenizer) -> str:
    """SHA-256 of a tokenizer's behaviour, independent of how its files are written."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left over from the last call that padded or truncated; no part of how text becomes ids here.
    backend.pop("padding", None)
    backend.pop("truncation", None)
    special = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token]
    return _sha256(json.dumps([backend, special], sort_keys=True, separators=(",", ":")))


def template_digest(template: str | None) -> str:
    """SHA-256 of a chat template, ``none`` where the tokenizer has none."""
    return "none" if template is None else _sha256(template)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
