"""The files of a model's weights: which are loaded, what is in them, and what their content is called.

They are read as bytes, from their headers on, without a deep-learning library.
"""

import hashlib
import math
import mmap
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpo_opt.schemas.errors import ConfigError, first_line, quoted
from dpo_opt.schemas.plain_data import json_of

WEIGHTS = "model.safetensors"
"""The file of a model that is not split."""
OTHER_FORMAT = "consolidated*"
"""Files of Mistral's own format: the same weights once more, under other names. Nobody loads them here."""

_INDEX = "model.safetensors.index.json"
# Bytes of a tensor that are looked at at once.
_CHUNK = 2**24
# Bits of the exponent, by dtype: where all are set, the value is infinite or no number.
_EXPONENTS = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
_BYTES = {
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
# Older releases of transformers stored the causal masks of GPT-2, GPT-J, GPT-Neo and GPT-NeoX.
_STORED_MASK = re.compile(r"\.(attn|attention)\.(masked_)?bias$")


_HEAD = re.compile(r"(^|\.)lm_head\.weight$")
_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|embedding)\.weight$"
)
# Of a reward or value model, which has the layers of a language model.
_OTHER_HEAD = re.compile(r"(^|\.)(v_head|value_head|reward_head|score|classifier)\.")


class StoredTensor(NamedTuple):
    """Where a tensor is: bytes ``begin`` to ``end`` of its file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def loaded_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers and vLLM load: those of the index, where there is one.

    Raises:
        ConfigError: The index cannot be read or names a file that is not there, the two would not load the
            same files, or transformers would find none.
    """
    files = {p.name for p in folder.glob("*.safetensors") if not fnmatch(p.name, OTHER_FORMAT)}
    if (folder / _INDEX).is_file():
        named = set(_weight_map(folder).values())
        if WEIGHTS in files and named != {WEIGHTS}:
            raise ConfigError(
                f"{WEIGHTS} stands beside {_INDEX}, which names other files",
                where=str(folder),
                why="transformers would load the one file, vLLM those that the index names",
                fix=f"remove {quoted(folder / WEIGHTS)}, or the index and its files",
            )
        if missing := sorted(named - files):
            raise ConfigError(
                f"{quoted(missing[0])} is missing, which {_INDEX} names",
                where=str(folder),
                why="a part of the weights would not be loaded",
                fix="copy or download the model again",
            )
        return [folder / name for name in sorted(named)]
    if WEIGHTS in files and len(files) > 1:
        other = min(files - {WEIGHTS})
        raise ConfigError(
            f"{quoted(other)} stands beside {WEIGHTS}, and there is no {_INDEX}",
            where=str(folder),
            why=f"transformers would load {WEIGHTS} alone, vLLM both",
            fix=f"cp -rL {quoted(folder)} MODEL && rm MODEL/{quoted(other)}, then pass MODEL",
        )
    if WEIGHTS not in files:
        alone = next(iter(files)) if len(files) == 1 else None
        renamed = f"mv MODEL/{quoted(alone)} MODEL/{WEIGHTS}"
        raise ConfigError(
            f"there is no {WEIGHTS}, and no {_INDEX}",
            where=str(folder),
            why="transformers would find no weights, vLLM would load every *.safetensors",
            fix="copy or download the model again"
            if alone is None
            else f"cp -rL {quoted(folder)} MODEL && {renamed}, then pass MODEL",
        )
    return [folder / WEIGHTS]


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor to the file that holds it, as the index says."""
    path = folder / _INDEX
    try:
        found = json_of(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(tensor): str(file) for tensor, file in found.items()}
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"not readable as an index of weights ({first_line(error)})",
            where=str(path),
            fix="copy or download the model again",
        ) from error


def weights_digest(folder: Path, *, contents: Mapping[str, tuple[str, str]] | None = None) -> str:
    """SHA-256 over every loaded tensor's name, dtype, shape and bytes: the same for a re-sharded copy.

    Args:
        folder: In the Hugging Face layout.
        contents: By tensor name, the dtype (``BF16``) and SHA-256 of what is to stand in the tensor's place.

    Raises:
        ConfigError: A safetensors file is truncated or damaged, or what is loaded is not certain.
    """
    others = contents or {}
    tensors = loaded_tensors(folder)
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        lines = sorted(pool.map(lambda t: _tensor_line(t, others.get(t.name)), tensors))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def loaded_tensors(folder: Path) -> list[StoredTensor]:
    """The tensors of all files that are loaded, from their headers.

    Raises:
        ConfigError: A tensor is in two of them, or not in the one that the index names.
    """
    tensors = [tensor for path in loaded_files(folder) for tensor in _tensors(path)]
    places: dict[str, Path] = {}
    for path, name, *_ in tensors:
        if name in places:
            raise ConfigError(
                f"the tensor {quoted(name)} is in {quoted(places[name].name)} and in {quoted(path.name)}",
                where=str(folder),
                why="which of them counts depends on the order in which the files are loaded",
                fix="save the model again with save_pretrained",
            )
        places[name] = path
    if (folder / _INDEX).is_file():
        for name, file in sorted(_weight_map(folder).items()):
            if places.get(name) != folder / file:
                raise ConfigError(
                    f"the tensor {quoted(name)} is not in {quoted(file)}, where {_INDEX} says it is",
                    where=str(folder),
                    why="the index is that of another model, or a file was exchanged",
                    fix="copy or download the model again",
                )
    return tensors


def _tensors(path: Path) -> list[StoredTensor]:
    """The tensors of a file, from its safetensors header."""
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
        for name, entry in json_of(header_bytes).items():
            if name != "__metadata__":
                begin, end = map(int, entry["data_offsets"])
                shape = tuple(map(int, entry["shape"]))
                found.append(StoredTensor(path, name, str(entry["dtype"]), shape, start + begin, start + end))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged from error
    if not _is_full(found, start=start, size=size):
        raise damaged
    return found


def _is_full(tensors: Sequence[StoredTensor], *, start: int, size: int) -> bool:
    """Whether tensors follow each other from ``start`` to the end of a file, each as long as its shape is."""
    end = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)):
        length = tensor.end - tensor.begin
        # Of dtypes of less than a byte only the places are looked at.
        expected = _BYTES[tensor.dtype] * math.prod(tensor.shape) if tensor.dtype in _BYTES else length
        if tensor.begin != end or length < 0 or length != expected:
            return False
        end = tensor.end
    return end == size


def _tensor_line(tensor: StoredTensor, content: tuple[str, str] | None) -> str:
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
    for path, name, dtype, _, begin, end in loaded_tensors(folder):
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


def own_head(folder: Path) -> tuple[str, str] | None:
    """The names of a head and an embedding of one shape that hold different weights; None where none do.

    Args:
        folder: In the Hugging Face layout.

    Raises:
        ConfigError: As ``weights_digest``.
    """
    tensors = loaded_tensors(folder)
    heads = [tensor for tensor in tensors if _HEAD.search(tensor.name)]
    tables = [tensor for tensor in tensors if _EMBEDDING.search(tensor.name)]
    for head in heads:
        for table in tables:
            if (head.dtype, head.shape) == (table.dtype, table.shape) and not _same_bytes(head, table):
                return head.name, table.name
    return None


def _same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.begin)
        second.seek(other.begin)
        left = one.end - one.begin
        while left:
            count = min(_CHUNK, left)
            if first.read(count) != second.read(count):
                return False
            left -= count
    return True


def refuse_left_over(names: Iterable[str], *, folder: Path) -> None:
    """Refuse a checkpoint for tensors that its class has no place for; stored causal masks are no weights.

    Args:
        names: Of such tensors.
        folder: Where they are.

    Raises:
        ConfigError: There are weights among them.
    """
    weights = sorted(name for name in names if not _STORED_MASK.search(name))
    if weights:
        raise ConfigError(
            f"the checkpoint holds {len(weights)} weights that the model has no place for, "
            f"such as {quoted(weights[0])}",
            where=str(folder),
            why="they would be left out of every log-prob, and of a model that is trained from them",
            fix=_way_out_of(weights, folder),
        )


def _way_out_of(left_over: Sequence[str], folder: Path) -> str:
    if any("lora_" in name for name in left_over):
        return "merge the adapter where it was trained (peft: model.merge_and_unload()), and save it again"
    if not all(_OTHER_HEAD.search(name) for name in left_over):
        return "correct config.json (number of layers, biases, architectures) until it fits the weights"
    save = "A.from_pretrained(sys.argv[1], dtype='auto').save_pretrained('MODEL')"
    return (
        f"cp -rL {quoted(folder)} MODEL && rm MODEL/*.safetensors* && "
        f'python -c "import sys; from transformers import AutoModelForCausalLM as A; {save}" '
        f"{quoted(folder)}, then pass MODEL: the language model without that head"
    )


def parameter_count(folder: Path) -> int:
    """Number of weights in a model's safetensors files, from their headers alone.

    Raises:
        ConfigError: There are none, or one is damaged.
    """
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{quoted(folder)} holds no *.safetensors weights",
            why="the model's size is read from them",
            fix="pass a folder with them, or use `dpo-opt check`, which needs the configuration alone",
        )
    return sum(math.prod(tensor.shape) for tensor in loaded_tensors(folder))
