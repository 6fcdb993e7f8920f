"""LoRA: plan an adapter, add it to the policy with peft, and save it.

LoRA adds two small trainable matrices to each frozen linear layer. peft puts them in place, so the model is
still the plain transformers model with the same decoder, head and attention. A new adapter changes nothing
(B = 0): the policy is still the reference, and parity is still measured.

    y = W x + lora_alpha / r * B A x,   A = (r, in), B = (out, r)     (Hu et al. 2021, arXiv 2106.09685)
"""

import contextlib
import copy
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo_opt.optimize.adapters.adapter_folder import (
    BASE_WEIGHTS,
    PREFIX,
    WEIGHTS,
    Adapter,
    read_adapter,
    require_base,
)
from dpo_opt.optimize.adapters.lora_targets import chosen_layers, left_out, offered_layers, short_names
from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.forward.architecture import model_without_weights
from dpo_opt.schemas.errors import ConfigError, first_line, quoted

MAX_RANK = 512
"""The largest rank that vLLM serves (``max_lora_rank``)."""
FOUR_BIT_OFFSET = (
    "the policy's frozen weights are in 4 bits, but the reference was scored with the 16-bit ones: at step 0 "
    "their log-probs differ by the error of the quantization, and training does not remove it"
)
"""Shown with ``load_in_4bit``, in place of the parity check."""
_NAME = "default"
_ALL_LINEAR = ["all-linear"]


class AdapterPlan(NamedTuple):
    """Which layers get an adapter and of what shape; made before any weight is loaded."""

    layers: tuple[str, ...]
    """Names of the modules that get an adapter, in the model's order."""
    rank: int
    alpha: float
    rslora: bool
    transposed: bool
    parameters: int
    """Number of trainable parameters, all fp32."""
    note: str | None
    """Which layers the default leaves out, in words; None if there is nothing to say."""
    continued: Adapter | None
    """The existing adapter to train further; None for a new one."""


def plan_adapter(config: TrainConfig, model_folder: Path) -> AdapterPlan:
    """Decide which layers get an adapter, and try it on the model without its weights.

    Args:
        config: With ``use_peft``.
        model_folder: The base model.

    Raises:
        ConfigError: An option would be ignored or cannot work, or vLLM or peft would refuse the adapter.
        DataError: The adapter of ``config.adapter`` is damaged.
    """
    require_usable(config)
    model = model_without_weights(model_folder)
    continued = read_adapter(config.adapter) if config.adapter else None
    targets = list(config.lora_target_modules or _ALL_LINEAR)
    note = None
    if continued is not None:
        _require_fitting(continued, config, model)
        require_base(continued, model_folder)
        layers: tuple[str, ...] = tuple(n for n, _ in model.named_modules() if n in set(continued.layers))
    elif targets == _ALL_LINEAR:
        layers, note = tuple(offered_layers(model)), left_out(model)
    else:
        layers = chosen_layers(model, targets)
    plan = AdapterPlan(
        layers=layers,
        rank=continued.rank if continued else config.lora_r,
        alpha=continued.alpha if continued else config.lora_alpha,
        rslora=bool(continued and continued.rslora),
        transposed=any(isinstance(model.get_submodule(layer), Conv1D) for layer in layers),
        parameters=0,
        note=note,
        continued=continued,
    )
    _inject(model, plan)
    if continued is not None:
        _require_shapes(continued, model)
    return plan._replace(parameters=sum(p.numel() for p in model.parameters() if p.requires_grad))


def require_usable(config: TrainConfig) -> None:
    """Check the LoRA options against each other and against this machine.

    Raises:
        ConfigError: An option would be ignored, or needs a device or package that this machine lacks.
    """
    if not config.use_peft:
        for name in ("adapter", "load_in_4bit", "lora_target_modules", "lora_r", "lora_alpha"):
            if getattr(config, name) != TrainConfig.model_fields[name].default:
                raise ConfigError(
                    f"--{name.replace('_', '-')} works only with an adapter, and none is trained",
                    why="all weights would be trained, and the option would be ignored",
                    fix="add --use-peft",
                )
        return
    if config.lora_r > MAX_RANK:
        raise ConfigError(
            f"--lora-r {config.lora_r} is more than {MAX_RANK}",
            why="vLLM serves no adapter of a higher rank",
            fix=f"pass --lora-r {MAX_RANK} or less, or train all weights (without --use-peft)",
        )
    if config.adapter and config.lora_target_modules:
        raise ConfigError(
            "--adapter and --lora-target-modules exclude each other",
            why="an existing adapter already has its layers",
            fix="leave --lora-target-modules out",
        )
    if config.load_in_4bit:
        if not torch.cuda.is_available():
            raise ConfigError(
                "--load-in-4bit needs a CUDA device",
                why="on a CPU bitsandbytes silently passes no gradient through 4-bit weights",
                fix="leave --load-in-4bit out; with --dtype bfloat16 a frozen model takes 2 bytes per weight",
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError("--load-in-4bit needs bitsandbytes", fix="pip install bitsandbytes")


@contextlib.contextmanager
def without_adapter(model: torch.nn.Module) -> Iterator[None]:
    """Meanwhile the model computes what its base does: an adapter that was trained before is left out."""
    # Only peft's layers have it; peft's own switch would also freeze the adapter.
    layers: list[Any] = [layer for layer in model.modules() if hasattr(layer, "_disable_adapters")]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def four_bit_options(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for QLoRA's NF4 weights (Dettmers et al. 2023, arXiv 2305.14314).

    transformers does not quantize the head.
    """
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def add_adapter(model: PreTrainedModel, plan: AdapterPlan, *, seed: int) -> None:
    """Freeze the model and add the planned adapter to it, in fp32 and in place.

    Args:
        model: The base model that ``plan`` was made for.
        plan: From ``plan_adapter``.
        seed: Decides A of a new adapter; its B is 0. An existing adapter brings both matrices.

    Raises:
        ConfigError: peft refuses the plan, or adapts other layers.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(model, plan)
    model.eval()  # the new modules come in training mode
    for adapted in _adapted(model).values():
        # Autocast decides the dtype of the products; a cast here would keep an fp32 copy of every input.
        adapted.cast_input_dtype_enabled = False
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if plan.continued is not None:
        for layer, a, b in plan.continued.tensors():
            module: Any = model.get_submodule(layer)
            module.lora_A[_NAME].weight.data.copy_(a)
            module.lora_B[_NAME].weight.data.copy_(b)


def trainable_names(model: nn.Module) -> list[str]:
    """Names, as in ``named_parameters``, of the trained parameters: all that a checkpoint must hold.

    Without an adapter these are all parameters.
    """
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def save_adapter(
    model: PreTrainedModel,
    folder: Path,
    *,
    base: str,
    base_weights: str | None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter in peft's layout, fp32, into an existing folder.

    Args:
        model: With an adapter from ``add_adapter``.
        folder: Folder for adapter_config.json and adapter_model.safetensors.
        base: Name of the base in adapter_config.json: a Hub name, or the path as it was given.
        base_weights: ``weights_digest`` of the base, so that the adapter is not merged into another model;
            None if it is not known.
        weights: The parameters of ``trainable_names``; None: those that the model has now.
    """
    named = dict(model.named_parameters()) if weights is None else weights
    tensors = {
        f"{PREFIX}{layer}.{side}.weight": named[f"{layer}.{side}.{_NAME}.weight"].detach().cpu().contiguous()
        for layer in _adapted(model)
        for side in ("lora_A", "lora_B")
    }
    metadata = {"format": "pt"} | ({BASE_WEIGHTS: base_weights} if base_weights else {})
    save_file(tensors, folder / WEIGHTS, metadata=metadata)
    config = copy.copy(cast(Any, model.peft_config[_NAME]))
    config.base_model_name_or_path = base
    # Full names: peft shortens them, and in another version's model a short name may match other layers too.
    config.target_modules = sorted(_adapted(model))
    config.inference_mode = True
    config.save_pretrained(str(folder))


def _inject(model: PreTrainedModel, plan: AdapterPlan) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=plan.rank,
        lora_alpha=plan.alpha,  # pyright: ignore[reportArgumentType]
        use_rslora=plan.rslora,
        fan_in_fan_out=plan.transposed,
        target_modules=list(plan.layers),
        # With dropout the policy would not be the reference at step 0.
        lora_dropout=0.0,
    )
    try:
        inject_adapter_in_model(config, model, adapter_name=_NAME)
    except ValueError as error:
        raise ConfigError(
            f"peft cannot put an adapter on these layers ({first_line(error)})",
            fix=f"pass --lora-target-modules with some of: {short_names(plan.layers)}",
        ) from error
    found = set(_adapted(model))
    if found != set(plan.layers):
        odd, known = sorted(found ^ set(plan.layers)), short_names(found & set(plan.layers))
        raise ConfigError(
            f"peft adapted other layers than it was asked to, such as {odd[0]}",
            why="other layers would be trained than were planned",
            fix=f"pass --lora-target-modules with some of: {known}",
        )


def _adapted(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _require_fitting(adapter: Adapter, config: TrainConfig, model: PreTrainedModel) -> None:
    default = TrainConfig.model_fields["lora_r"].default
    if config.lora_r not in (default, adapter.rank) or adapter.rank > MAX_RANK:
        raise ConfigError(
            f"the adapter has rank {adapter.rank}"
            + (
                f", --lora-r is {config.lora_r}"
                if adapter.rank <= MAX_RANK
                else f", vLLM's limit is {MAX_RANK}"
            ),
            where=str(adapter.folder),
            fix="leave --lora-r out, or train a new adapter on the merged model",
        )
    missing = sorted(set(adapter.layers) - set(offered_layers(model)))
    if missing:
        raise ConfigError(
            f"the adapter has a layer {quoted(missing[0])}, which the model lacks or which cannot be trained "
            "here",
            where=str(adapter.folder),
            why="the layer would silently be left out",
            fix="pass the model that the adapter was trained on as --model, or train a new one on the merged "
            "model",
        )


def _require_shapes(adapter: Adapter, model: PreTrainedModel) -> None:
    for layer, a, b in adapter.tensors():
        module: Any = model.get_submodule(layer)
        wanted = [module.lora_A[_NAME].weight.shape, module.lora_B[_NAME].weight.shape]
        if [a.shape, b.shape] != wanted:
            raise ConfigError(
                f"the adapter's matrices for {quoted(layer)} are {tuple(a.shape)} and {tuple(b.shape)}, "
                f"the model needs {tuple(wanted[0])} and {tuple(wanted[1])}",
                where=str(adapter.folder),
                fix="pass the model that the adapter was trained on as --model",
            )
