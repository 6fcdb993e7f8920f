"""Writes safetensors files and hashes their bytes on the way, so that no file is read again to be hashed.

The safetensors library writes a file in one call and says no hash. Everything is still read with it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
# Bytes hashed and written at a time: they stay in the processor's cache in between.
_CHUNK = 2**20


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write a safetensors file.

    Args:
        path: The new file.
        tensors: Of any shape, in any memory.
        metadata: Goes into the file's header.

    Returns:
        Hex SHA-256 of the file's bytes.

    Raises:
        OSError: It cannot be written, for example because the disk is full.
    """
    # Wide numbers first, so that every tensor begins at a multiple of its items' size.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in _chunks({name: tensors[name] for name in names}, metadata):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def _chunks(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    for tensor in tensors.values():
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        data = memoryview(flat.numpy())  # type: ignore[arg-type]
        yield from (data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK))
