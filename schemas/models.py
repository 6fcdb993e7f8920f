"""A model on disk: where it is, whether it is safe to load, and what its content is called.

A path or a Hub name says nothing about content; these digests do. They read bytes only, so the stage
that plans a job needs no deep-learning library to know exactly which model it is about.
"""

import hashlib
import json
import math
import mmap
import os
import re
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.hub import fetch

VOLATILE_CONFIG_KEYS = frozenset(
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
"""Keys of config.json that may change when a model is saved again, without changing one log-prob.

``architectures`` chooses the implementation, and is compared by itself (``stated_architecture``).
"""


# Names under which transformers' configurations state the longest sequence. The first that is there counts:
# later ones stand beside it as leftovers (n_ctx of GPT-2 checkpoints).
_CONTEXT_KEYS: tuple[str, ...] = (
    "max_position_embeddings",
    "n_positions",  # GPT-2, GPT-J, CodeGen, BigCode
    "max_seq_len",  # MPT, DBRX
    "seq_length",  # ChatGLM, BLOOM
    "model_max_length",  # Kimi Linear
    "max_sequence_length",
    "max_seq_length",
    "max_target_positions",  # decoders of speech models
    "context_length",  # RWKV
    "n_ctx",
)
# Older releases of transformers stored the causal masks of GPT-2, GPT-J, GPT-Neo and GPT-NeoX.
_STORED_MASK = re.compile(r"\.(attn|attention)\.(masked_)?bias$")
# The name that the Hub's cache gives to a folder of files.
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Bytes of a tensor that are looked at at once.
_CHUNK = 2**24
# Bits of the exponent, by dtype: where all are set, the value is infinite or no number.
_EXPONENTS = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}


# Hub names that this process has asked for: a branch may move between two looks at it.
_fetched: dict[str, Path] = {}


def find_model(model: str) -> Path:
    """Folder of a model's files: a local path, or ``ORGANISATION/NAME`` on the Hub, fetched.

    ``ORGANISATION/NAME@REVISION`` is one commit, branch or tag. In one process a name is one commit, whatever
    happens on the Hub meanwhile.

    Raises:
        ConfigError: There is no such folder, the Hub cannot provide it, or it is not safe to load.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        known = _fetched.get(model)
        folder = known if known is not None and known.is_dir() else _fetch(model)
        _fetched[model] = folder
    _refuse_unsafe(folder)
    return folder


def pinned_name(model: str, folder: Path) -> str:
    """What names these very files later and elsewhere: a Hub name with its commit, any other as it is.

    Args:
        model: As ``find_model`` got it.
        folder: What it found.
    """
    if Path(model).expanduser().is_dir() or not _COMMIT.fullmatch(folder.name):
        return model
    return f"{model.partition('@')[0]}@{folder.name}"


def _fetch(model: str) -> Path:
    looks_local = model.startswith((".", "/", "~")) or model.count("/") != 1
    if looks_local:
        raise ConfigError(
            f"there is no model folder {model!r}",
            why="the reference is loaded from a folder with config.json and *.safetensors",
            fix="pass --model with an existing folder, or a Hub name such as organisation/model@commit",
        )
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    name, _, revision = model.partition("@")
    return fetch(name, kind="model", revision=revision or None, patterns=patterns, extra="train")


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
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{folder} holds a model and an adapter (config.json and adapter_config.json)",
            why="transformers would add the adapter to the model's weights, which may hold it already, and "
            "save only the adapter after training; vLLM would leave it out",
            fix=f"cp -rL {folder} MODEL && rm MODEL/adapter_*, then pass MODEL if its weights are merged; if "
            f"not, dpo-opt merge --model MODEL --adapter {folder} --output MERGED, then pass MERGED",
        )
    if "auto_map" in read_config(folder):
        raise ConfigError(
            f"{folder} asks to run its own Python code (auto_map in config.json)",
            why="loading it would execute code from the model folder",
            fix="use a model that transformers supports without remote code",
        )
    gone = next((path for path in folder.glob("*.safetensors") if not path.exists()), None)
    if gone is not None:
        raise ConfigError(
            "it is a link to a file that is not there",
            where=str(gone),
            why="the model's weights are in it",
            fix="download or copy the model again",
        )
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{folder} holds no *.safetensors weights",
            why="other weight formats are pickles, which can run code when loaded",
            fix="convert the model with save_pretrained(..., safe_serialization=True)",
        )
    if "transformers_weights" in read_config(folder):
        raise ConfigError(
            f"{folder} names the file of its weights (transformers_weights in config.json)",
            why="transformers would load that file, vLLM the others",
            fix=f"cp -rL {folder} MODEL, remove the key and call the file {_WEIGHTS}, then pass MODEL",
        )
    loaded_files(folder)


def loaded_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers and vLLM load: those of the index, where there is one.

    Raises:
        ConfigError: The index cannot be read or names a file that is not there, or the two would not load
            the same files.
    """
    # The other format of Mistral's models: the same weights under other names.
    files = {p.name for p in folder.glob("*.safetensors") if not p.name.startswith("consolidated")}
    if (folder / _INDEX).is_file():
        named = set(_weight_map(folder).values())
        if _WEIGHTS in files and named != {_WEIGHTS}:
            raise ConfigError(
                f"{_WEIGHTS} stands beside {_INDEX}, which names other files",
                where=str(folder),
                why="transformers would load the one file, vLLM those that the index names",
                fix=f"remove {folder / _WEIGHTS}, or the index and its files",
            )
        if missing := sorted(named - files):
            raise ConfigError(
                f"{missing[0]} is missing, which {_INDEX} names",
                where=str(folder),
                why="a part of the weights would not be loaded",
                fix="copy or download the model again",
            )
        return [folder / name for name in sorted(named)]
    if _WEIGHTS in files and len(files) > 1:
        other = min(files - {_WEIGHTS})
        raise ConfigError(
            f"{other} stands beside {_WEIGHTS}, and there is no {_INDEX}",
            where=str(folder),
            why=f"transformers would load {_WEIGHTS} alone, vLLM both",
            fix=f"cp -rL {folder} MODEL && rm MODEL/{other}, then pass MODEL",
        )
    return [folder / name for name in sorted(files)] or sorted(folder.glob("*.safetensors"))


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor to the file that holds it, as the index says."""
    path = folder / _INDEX
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(tensor): str(file) for tensor, file in found.items()}
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"not readable as an index of weights ({type(error).__name__}: {error})",
            where=str(path),
            fix="copy or download the model again",
        ) from error


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


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration that is about text: all of it, unless other modalities stand beside it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def checkpoint_dtype(folder: Path) -> str:
    """The dtype the checkpoint declares, ``float32`` where it declares none."""
    config = read_config(folder)
    stated = (part.get(key) for part in (config, text_config(config)) for key in ("dtype", "torch_dtype"))
    return str(next((dtype for dtype in stated if dtype), "float32"))


def context_length(folder: Path) -> int | None:
    """Most tokens a sequence may have, where the config states it; see ``stated_context``."""
    return stated_context(read_config(folder))


def stated_context(config: Mapping[str, Any]) -> int | None:
    """Most tokens a sequence may have by a config.json, None where it states nothing.

    Beyond it, learned positions end in a crash, and rotary ones in angles that the model never saw. Scaled
    rotary embeddings count: ``linear`` and ``dynamic`` stretch the stated positions by their factor, ``yarn``
    stretches those that it began with. Beside ``longrope``, ``llama3`` and anything of Gemma 3 the stated
    positions are the stretched ones.
    """
    text = text_config(config)
    scalings = _rope_scalings(text)
    keys = _CONTEXT_KEYS
    if scalings or "rope_theta" in text:
        # Command-R states what it was trained for under this name, and less under the other.
        keys = ("model_max_length", *keys)
    stated = next(
        (int(part[key]) for part in (text, config) for key in keys if _is_count(part.get(key))), None
    )
    if stated is None or "gemma3" in str(text.get("model_type", config.get("model_type"))):
        return stated
    return max([stated, *(_stretched(stated, scaling, text) for scaling in scalings)])


def _is_count(value: object) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    )


def _rope_scalings(text: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The settings of scaled rotary embeddings: one, or one for each type of layer."""
    found = [text.get("rope_scaling"), text.get("rope_parameters")]
    flat: list[Mapping[str, Any]] = [value for value in found if isinstance(value, dict)]
    return flat + [part for value in flat for part in value.values() if isinstance(part, dict)]


def _stretched(stated: int, scaling: Mapping[str, Any], text: Mapping[str, Any]) -> int:
    kind = scaling.get("rope_type") or scaling.get("type")
    factor = scaling.get("factor")
    if not isinstance(factor, int | float):
        return stated
    if kind in ("linear", "dynamic"):
        return int(stated * factor)
    if kind == "yarn":
        key = "original_max_position_embeddings"
        return int(factor * (scaling.get(key) or text.get(key) or stated))
    return stated


def config_digest(folder: Path) -> str:
    """SHA-256 of what config.json says about the computation; names and versions left out."""
    return digest_of_config(read_config(folder))


def digest_of_config(config: Mapping[str, Any]) -> str:
    """As ``config_digest``, of what a config.json holds."""
    said = {k: v for k, v in config.items() if k not in VOLATILE_CONFIG_KEYS}
    return _sha256(json.dumps(said, sort_keys=True, separators=(",", ":")))


def stated_architecture(folder: Path) -> str | None:
    """The class that config.json names for the model: engines choose their implementation by it.

    None where it names none, and the model's type decides.
    """
    stated = read_config(folder).get("architectures")
    return ",".join(map(str, stated)) or None if isinstance(stated, list) else None


def weights_digest(folder: Path, *, contents: Mapping[str, tuple[str, str]] | None = None) -> str:
    """SHA-256 over every loaded tensor's name, dtype, shape and bytes: the same for a re-sharded copy.

    Args:
        folder: In the Hugging Face layout.
        contents: By tensor name, the dtype (``BF16``) and SHA-256 of what is to stand in the tensor's place.

    Raises:
        ConfigError: A safetensors file is truncated or damaged, or what is loaded is not certain.
    """
    others = contents or {}
    tensors = _loaded_tensors(folder)
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        lines = sorted(pool.map(lambda t: _tensor_line(t, others.get(t[1])), tensors))
    return _sha256("\n".join(lines))


def _loaded_tensors(folder: Path) -> list[tuple[Path, str, str, tuple[int, ...], int, int]]:
    """As ``_tensors``, of all files that are loaded.

    Raises:
        ConfigError: A tensor is in two of them, or not in the one that the index names.
    """
    tensors = [tensor for path in loaded_files(folder) for tensor in _tensors(path)]
    places: dict[str, Path] = {}
    for path, name, *_ in tensors:
        if name in places:
            raise ConfigError(
                f"the tensor {name} is in {places[name].name} and in {path.name}",
                where=str(folder),
                why="which of them counts depends on the order in which the files are loaded",
                fix="save the model again with save_pretrained",
            )
        places[name] = path
    if (folder / _INDEX).is_file():
        for name, file in sorted(_weight_map(folder).items()):
            if places.get(name) != folder / file:
                raise ConfigError(
                    f"the tensor {name} is not in {file}, where {_INDEX} says it is",
                    where=str(folder),
                    why="the index is that of another model, or a file was exchanged",
                    fix="copy or download the model again",
                )
    return tensors


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
    # The format has no byte after the last tensor.
    ends = max((end for *_, end in found), default=start)
    if ends != size or any(not start <= begin <= end for *_, begin, end in found):
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


def nonfinite_tensor(folder: Path) -> str | None:
    """Name of the first tensor that holds a NaN or an infinity, None where all weights are numbers.

    Reads all weights, a few MiB at a time; other dtypes than F64, F32, F16 and BF16 are passed over.

    Raises:
        ConfigError: A safetensors file is truncated or damaged.
    """
    for path, name, dtype, _, begin, end in _loaded_tensors(folder):
        if dtype not in _EXPONENTS:
            continue
        layout, exponent = _EXPONENTS[dtype]
        with path.open("rb") as handle:
            handle.seek(begin)
            for start in range(begin, end, _CHUNK):
                bits = np.frombuffer(handle.read(min(_CHUNK, end - start)), dtype=layout)
                if bool(((bits & exponent) == exponent).any()):
                    return name
    return None


def left_over_weights(names: Iterable[str]) -> list[str]:
    """Of a checkpoint's tensors that its class has no place for, those that count: causal masks do not."""
    return [name for name in names if not _STORED_MASK.search(name)]


def parameter_count(folder: Path) -> int:
    """Number of weights in a model's safetensors files, from their headers alone."""
    return sum(math.prod(shape) for _, _, _, shape, _, _ in _loaded_tensors(folder))


class _Backend(Protocol):
    def to_str(self) -> str: ...


class FastTokenizer(Protocol):
    """The part of a transformers tokenizer that decides how text becomes ids."""

    backend_tokenizer: _Backend
    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    split_special_tokens: bool


def tokenizer_digest(tokenizer: FastTokenizer) -> str:
    """SHA-256 of a tokenizer's behaviour, independent of how its files are written."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left over from the last call that padded or truncated; no part of how text becomes ids here.
    backend.pop("padding", None)
    backend.pop("truncation", None)
    special: list[object] = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token]
    if tokenizer.split_special_tokens:
        special.append({"split_special_tokens": True})
    return _sha256(json.dumps([backend, special], sort_keys=True, separators=(",", ":")))


def template_digest(templates: Mapping[str, str]) -> str:
    """SHA-256 of a tokenizer's chat templates by name, ``none`` where it has none.

    Of one that is called ``default`` it is that of its text; of others that of all as compact JSON.
    """
    if not templates:
        return "none"
    if templates.keys() == {"default"}:
        return _sha256(templates["default"])
    return _sha256(json.dumps(dict(templates), sort_keys=True, separators=(",", ":")))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
