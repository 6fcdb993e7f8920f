"""Merges a LoRA adapter into its base model (``dpo-opt merge``), with the same bits on every machine.

Training an existing adapter further needs a reference that was scored with the adapter merged. Because the
merge is the same everywhere, the merged model's digest follows from base and adapter, and the check before
training does not need the merged folder.

    r = rank, W = weight of a layer (out, in), A = (r, in), B = (out, r), merged = W + scaling * B A
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from dpo_opt.optimize.adapters.adapter_folder import Adapter
from dpo_opt.optimize.forward.architecture import model_without_weights
from dpo_opt.schemas.errors import ConfigError, quoted
from dpo_opt.schemas.models import read_config
from dpo_opt.schemas.progress import Progress
from dpo_opt.schemas.tokenizer_files import copy_tokenizer
from dpo_opt.schemas.weights import OTHER_FORMAT, loaded_files, weights_digest

_CODES = {torch.float32: "F32"}
# Entries computed at a time: so many fit into the CPU's cache.
_BLOCK = 2**18
_COPIED = ("*.json", "*.jinja", "*.txt", "LICENSE*", "NOTICE*")


class Merged(NamedTuple):
    """A merged tensor, and how much of the change rounding took away."""

    tensor: Tensor
    change: float
    """Sum of squares of the intended change."""
    error: float
    """Sum of squares of the rounding error."""


def merged_digests(model_folder: Path, adapter: Adapter) -> Iterator[str]:
    """Digests of the weights that ``write_merged`` would write: in the base's dtype, then in fp32.

    Raises:
        ConfigError: See ``write_merged``.
    """
    layers = _tensors_of_layers(model_folder, adapter)
    for dtype in (None, torch.float32):
        contents = {}
        for file in loaded_files(model_folder):
            with safe_open(file, framework="pt") as handle:
                names = layers.get(file, {}) if dtype is None else handle.keys()
                for name in names:
                    tensor = _merged(handle.get_tensor(name), layers.get(file, {}).get(name), adapter, dtype)
                    code = _CODES.get(tensor.tensor.dtype, handle.get_slice(name).get_dtype())
                    content = tensor.tensor.flatten().view(torch.uint8).numpy().data
                    contents[name] = code, hashlib.sha256(content).hexdigest()
        yield weights_digest(model_folder, contents=contents)


def write_merged(
    model_folder: Path, adapter: Adapter, output: Path, *, dtype: torch.dtype | None, progress: Progress
) -> float:
    """Write the merged model into an existing folder, with the base's tokenizer, settings and licence.

    One file of weights is in memory at a time.

    Args:
        model_folder: The base, in the Hugging Face layout.
        adapter: What to merge into it.
        output: An empty folder.
        dtype: Dtype of the weights. None: tensors keep their own, and those without an adapter their bytes.
        progress: Advances once per file.

    Returns:
        Share of the change that rounding to the dtype took away: norm of the error over norm of the change.

    Raises:
        ConfigError: The base is quantized or holds weights twice, or the adapter is for another model.
    """
    layers = _tensors_of_layers(model_folder, adapter)
    files = loaded_files(model_folder)
    change = error = 0.0
    progress.start("merging", total=len(files), unit="files")
    for file in files:
        tensors = {}
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                found = _merged(handle.get_tensor(name), layers.get(file, {}).get(name), adapter, dtype)
                tensors[name] = found.tensor
                change, error = change + found.change, error + found.error
            save_file(tensors, output / file.name, metadata=handle.metadata())
        progress.advance(1, file.name)
    progress.finish()
    for pattern in _COPIED:
        for path in model_folder.glob(pattern):
            if path.is_file() and not fnmatch(path.name, OTHER_FORMAT):
                shutil.copyfile(path, output / path.name)
    copy_tokenizer(model_folder, output)
    if dtype is not None:
        config = read_config(model_folder)
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
        (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return (error / change) ** 0.5 if change else 0.0


def _merged(
    weight: Tensor, matrices: tuple[Tensor, Tensor] | None, adapter: Adapter, dtype: torch.dtype | None
) -> Merged:
    if dtype is None or not weight.is_floating_point():
        dtype = weight.dtype
    if matrices is None:
        return Merged(weight.to(dtype), 0.0, 0.0)
    return merge_tensor(weight, *matrices, adapter=adapter, dtype=dtype)


def merge_tensor(weight: Tensor, a: Tensor, b: Tensor, *, adapter: Adapter, dtype: torch.dtype) -> Merged:
    """W + scaling * B A.

    Products and sums are computed one by one, in a fixed order, each rounded once as IEEE 754 prescribes. A
    matrix product's last bits depend on the machine, and the digest of the merged model would too.

    Args:
        weight: (out, in), or (in, out) if the adapter is transposed.
        a: (r, in).
        b: (out, r).
        adapter: Gives the scaling and the orientation.
        dtype: Dtype of the result. In bf16, changes smaller than W's rounding are lost.
    """
    a, b = a.float(), b.float() * adapter.scaling
    if adapter.transposed:
        a, b = b.T, a.T
    a = a.contiguous()
    merged = torch.empty(weight.shape, dtype=dtype)
    change = error = 0.0
    rows = max(1, _BLOCK // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        block = slice(start, start + rows)
        columns = b[block].T.contiguous()
        total = columns[0][:, None] * a[0]
        term = torch.empty_like(total)
        for column, row in zip(columns[1:], a[1:], strict=True):
            total += torch.mul(column[:, None], row, out=term)
        change += float(total.square().sum())
        merged[block] = total.add_(weight[block].float())
        error += float(total.sub_(merged[block].float()).square_().sum())
    return Merged(merged, change, error)


def _tensors_of_layers(model_folder: Path, adapter: Adapter) -> dict[Path, dict[str, tuple[Tensor, Tensor]]]:
    """The adapter's matrices (A, B), by the base's file and tensor name that they change."""
    if "quantization_config" in read_config(model_folder):
        raise ConfigError(
            "the base's weights are quantized",
            where=str(model_folder),
            why="rounding to so few bits would lose an adapter's small changes",
            fix="pass the 16-bit model that the base was quantized from as --model",
        )
    places: dict[str, tuple[Path, list[int]]] = {}
    for file in loaded_files(model_folder):
        with safe_open(file, framework="pt") as handle:
            places |= {name: (file, handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    saved_as = _saved_names(model_folder, places)
    found: dict[Path, dict[str, tuple[Tensor, Tensor]]] = {}
    for layer, a, b in adapter.tensors():
        name = saved_as.get(f"{layer}.weight")
        shape = [a.shape[1], b.shape[0]] if adapter.transposed else [b.shape[0], a.shape[1]]
        if name is None or places[name][1] != shape:
            has = f"there its shape is {places[name][1]}" if name else "the checkpoint has no such tensor"
            raise ConfigError(
                f"the adapter has a layer {quoted(layer)} of shape {shape}; {has}",
                where=str(model_folder),
                why="the adapter is for another model, or transformers joins this model's tensors when it "
                "loads them",
                fix="pass the model that the adapter was trained on as --model; or merge with peft's "
                "merge_and_unload and train with --reference-differs",
            )
        found.setdefault(places[name][0], {})[name] = a, b
    return found


def _saved_names(model_folder: Path, names: Iterable[str]) -> dict[str, str]:
    """From each parameter that transformers reads from one tensor to that tensor's name in the checkpoint.

    The two differ: GPT-2's checkpoint has h.0.attn for transformer.h.0.attn, and most vision models are saved
    with language_model.model.layers for model.language_model.layers.
    """
    model = model_without_weights(model_folder)
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    parameters = model.state_dict()
    found = {}
    for name in sorted(names):
        parameter, converted = rename_source_key(
            name, renamings, converters, model.base_model_prefix, parameters
        )
        if converted is None:
            found[parameter] = name
    return found
