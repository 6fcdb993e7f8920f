"""Reads a LoRA adapter folder in peft's layout, and checks that it is plain LoRA for the right base model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dpo_opt.schemas.errors import ConfigError, DataError, first_line, quoted
from dpo_opt.schemas.models import ADAPTER_CONFIG
from dpo_opt.schemas.plain_data import json_of
from dpo_opt.schemas.weights import weights_digest

WEIGHTS = "adapter_model.safetensors"
BASE_WEIGHTS = "base_weights"
"""Metadata of the weights' file: digest of the base that the adapter was trained on."""
PREFIX = "base_model.model."

# Keys of a configuration that do not change what the two matrices mean. Every other feature must be off.
_HARMLESS = {
    *("r", "lora_alpha", "target_modules", "use_rslora", "fan_in_fan_out", "lora_dropout", "task_type"),
    *("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size"),
}
# The other initializations (PiSSA, OLoRA, CorDA, LoftQ) change the base's weights when they are loaded.
_HARMLESS_INITS = {"gaussian", "eva", "orthogonal"}


class Adapter(NamedTuple):
    """A plain LoRA adapter, in peft's layout."""

    folder: Path
    rank: int
    alpha: float
    rslora: bool
    """The scaling is alpha / sqrt(r) instead of alpha / r."""
    transposed: bool
    """The base keeps its weights as (in, out), as GPT-2 does."""
    layers: tuple[str, ...]
    """Names of the modules that it adapts, sorted."""
    base_weights: str | None
    """Digest of the base's weights; None for an adapter that another program trained."""

    @property
    def scaling(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def tensors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Layer, A and B, one layer after another."""
        with safe_open(self.folder / WEIGHTS, framework="pt") as file:
            for layer in self.layers:
                a, b = (file.get_tensor(f"{PREFIX}{layer}.lora_{x}.weight") for x in "AB")
                yield layer, a, b


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's configuration and the names and shapes of its matrices, not their contents.

    Raises:
        ConfigError: There is no adapter, or it is not plain LoRA.
        DataError: Its files are damaged or do not belong together.
    """
    for name in (ADAPTER_CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ConfigError(
                f"{quoted(folder)} holds no {name}",
                why=f"an adapter is a folder with both {ADAPTER_CONFIG} and {WEIGHTS}",
                fix="pass --adapter with a folder that `dpo-opt train --use-peft` or peft's save_pretrained "
                "wrote",
            )
    try:
        config = json_of((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"not an adapter's configuration ({first_line(error)})", where=str(folder / ADAPTER_CONFIG)
        ) from error
    _refuse_features(config, folder)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise DataError(
            f"the adapter's weights cannot be read ({first_line(error)})",
            where=str(folder / WEIGHTS),
            fix="copy the adapter again",
        ) from error
    suffix = ".lora_A.weight"
    layers = sorted(n.removeprefix(PREFIX).removesuffix(suffix) for n in shapes if n.endswith(suffix))
    expected = {f"{PREFIX}{layer}.lora_{x}.weight" for layer in layers for x in "AB"}
    ranks = {shapes[f"{PREFIX}{layer}{suffix}"][0] for layer in layers if expected <= set(shapes)}
    if not layers or expected != set(shapes) or ranks != {rank}:
        shown = ", ".join(map(quoted, sorted(expected ^ set(shapes))[:1] or sorted(ranks)))
        raise DataError(
            f"the weights are not pairs of LoRA matrices of rank {rank} (see {shown or 'no pair'})",
            where=str(folder / WEIGHTS),
            why="the other tensors would silently be left out of the model",
            fix="save the adapter again with peft's save_pretrained",
        )
    return Adapter(
        folder=folder,
        rank=rank,
        alpha=alpha,
        rslora=bool(config.get("use_rslora")),
        transposed=bool(config.get("fan_in_fan_out")),
        layers=tuple(layers),
        base_weights=metadata.get(BASE_WEIGHTS),
    )


def _refuse_features(config: dict[str, Any], folder: Path) -> None:
    init = config.get("init_lora_weights", True)
    features = [
        f"{quoted(name)}={value!r}"
        for name, value in config.items()
        if value
        and name not in _HARMLESS
        and (name, value) not in (("peft_type", "LORA"), ("bias", "none"))
        and not (name == "init_lora_weights" and (init is True or init in _HARMLESS_INITS))
    ]
    if features or config.get("peft_type") != "LORA":
        raise ConfigError(
            f"the adapter is not plain LoRA ({', '.join(features) or 'no peft_type'})",
            where=str(folder / ADAPTER_CONFIG),
            why="only the two matrices of each layer are read here; the rest would silently be lost",
            fix="merge it with peft's own merge_and_unload, and continue from the merged model",
        )


def require_base(adapter: Adapter, model_folder: Path) -> None:
    """Refuse an adapter that dpo-opt trained on another base. Other adapters do not record their base.

    Raises:
        ConfigError: The base is another model.
    """
    if adapter.base_weights is None:
        return
    found = weights_digest(model_folder)
    if found != adapter.base_weights:
        raise ConfigError(
            f"the adapter was trained on a base with weights {quoted(adapter.base_weights[:16])}..., but "
            f"{quoted(model_folder)} has {found[:16]}...",
            where=str(adapter.folder),
            why="on another model the adapter's matrices mean nothing",
            fix="pass the model that the adapter was trained on as --model",
        )
