"""Estimates the memory of a training run by component, before any weight is loaded (``train --dry-run``).

Activations are not guessed from a formula, which another architecture would break. The decoder runs forward
and backward on tensors that have shapes and dtypes but no data, and the bytes in use are counted.
"""

import logging
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, PreTrainedModel

from dpo_opt.optimize.adapters.lora import add_adapter, plan_adapter
from dpo_opt.optimize.adapters.lora_targets import has_experts
from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.forward.activations import checkpoint_activations
from dpo_opt.optimize.forward.architecture import decoder_of, model_without_weights, projection_of
from dpo_opt.optimize.forward.attention import STOCK_ATTENTION, refuse_unknown
from dpo_opt.optimize.forward.policy import compute_dtype
from dpo_opt.optimize.forward.varlen import attention_dtype

_SHAPES_ONLY = "dpo_opt_shapes"
# This logger prints a traceback for every operation that does not work without data.
_log = logging.getLogger("torch._subclasses.fake_tensor")
# Moments per trained parameter. In 8 bits, AdamW's two moments also have a scale per block of 256.
_MOMENTS = {"adamw": 2, "rmsprop": 1}
_EIGHT_BIT_STATE = 2 * (1 + 4 / 256)
_FOUR_BIT_WEIGHT = 0.5 + 1 / 64


class Memory(NamedTuple):
    """Bytes at the peak of a step, on the policy's device."""

    parameters: int
    """Number of weights, including an adapter's."""
    trained: int
    """Number of trained weights."""
    weights: int
    gradients: int
    optimizer: int
    activations: int | None
    """What the decoder keeps from forward to backward for a sequence of ``rows``. In models with soft-capped
    attention or sinks this includes each layer's (rows, rows) scores. None: not known without data."""
    head: int
    """The head's fp32 gradient sum, in addition to its parameter's gradient."""
    save: int
    """What a save copies to main memory: the weights that a checkpoint holds, and the optimizer's state."""
    online_reference: int
    """What a reference model in memory would add, in the compute dtype; 0 for an adapter: its base is one."""
    rows: int
    """Token rows per micro-batch that ``activations`` is for."""

    @property
    def total(self) -> int:
        """Sum of the components, without Python, its libraries and the allocator's waste."""
        return self.weights + self.gradients + self.optimizer + (self.activations or 0) + self.head


def estimate_memory(config: TrainConfig, model_folder: Path, *, rows: int, device: torch.device) -> Memory:
    """Memory of a run with a single process.

    Args:
        config: Decides what is trained, how it is stored and with which optimizer.
        model_folder: The policy; its weights are not read.
        rows: Token rows per micro-batch.
        device: The device that the run will use; nothing is allocated on it.

    Raises:
        ConfigError: transformers cannot build the model, or the adapter does not fit it.
    """
    model = model_without_weights(model_folder)
    compute = compute_dtype(config.dtype, device)
    stored: torch.dtype = compute if config.use_peft else getattr(torch, config.param_dtype)
    whole = sum(parameter.numel() for parameter in model.parameters())
    torch.nn.Module.to(model, stored)
    weights = whole * stored.itemsize
    head = projection_of(model)
    if config.load_in_4bit:
        linear = sum(
            m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head
        )
        weights += int((_FOUR_BIT_WEIGHT - stored.itemsize) * linear)
    model.requires_grad_(False)
    if config.use_peft:
        add_adapter(model, plan_adapter(config, model_folder)._replace(continued=None), seed=config.seed)
    else:
        # As in ``load_policy``: image and audio parts are loaded but not trained.
        for part in (decoder_of(model), head):
            part.requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    gradients = sum(parameter.numel() * parameter.itemsize for parameter in trained)
    if config.use_peft:
        weights += gradients
    optimizer = optimizer_bytes(trained, config)
    return Memory(
        parameters=whole + (count if config.use_peft else 0),
        trained=count,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        save=(gradients if config.use_peft else weights) + optimizer,
        head=4 * head.weight.numel() if head.weight.requires_grad else 0,
        online_reference=0 if config.use_peft else whole * compute.itemsize,
        activations=_activations(model, config, compute=compute, rows=rows, device=device),
        rows=rows,
    )


def optimizer_bytes(parameters: Iterable[Tensor], config: TrainConfig) -> int:
    """Bytes of optimizer state for these parameters, or for this process's part of them."""
    local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    if config.optim == "adamw-8bit":
        return int(_EIGHT_BIT_STATE * sum(p.numel() for p in local))
    return _MOMENTS[config.optim] * sum(p.numel() * p.itemsize for p in local)


def _activations(
    model: PreTrainedModel, config: TrainConfig, *, compute: torch.dtype, rows: int, device: torch.device
) -> int | None:
    """Peak of a forward and backward of the decoder, in bytes, beyond parameters and their gradients."""
    scale = 1
    if has_experts(model):
        # Products grouped by expert run without data only in bf16.
        scale = model.dtype.itemsize // torch.bfloat16.itemsize
        torch.nn.Module.to(model, torch.bfloat16)
        compute = torch.bfloat16
    _log.disabled = True
    try:
        checkpoint_activations(model, config.activation_checkpointing)
        with FakeTensorMode(allow_non_fake_inputs=True):
            decoder = decoder_of(model).to_empty(device=device)
            # As in loading: if no kernel supports the model's attention, use its own, which keeps the scores.
            for attention in (_SHAPES_ONLY, STOCK_ATTENTION):
                peak = _peak(decoder, attention, compute=compute, rows=rows, device=device)
                if peak is not None:
                    return scale * peak
        return None
    finally:
        _log.disabled = False


def _peak(
    decoder: PreTrainedModel, attention: str, *, compute: torch.dtype, rows: int, device: torch.device
) -> int | None:
    try:
        decoder.set_attn_implementation(attention)
        for parameter in decoder.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        live = _LiveBytes(decoder)
        positions = torch.arange(rows, device=device)[None]
        mixed = any(parameter.dtype != compute for parameter in decoder.parameters())
        with live:
            with torch.autocast(device.type, dtype=compute, enabled=mixed, cache_enabled=False):
                hidden = decoder(
                    input_ids=positions, position_ids=positions, use_cache=False
                ).last_hidden_state
            hidden.backward(torch.empty_like(hidden))
        return live.peak
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        # The model needs another attention, or something in it does not run without data.
        return None


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations allocate, for as long as a tensor uses them."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._live = 0
        held = [*module.parameters(), *module.buffers()]
        held += [p.grad for p in module.parameters() if p.grad is not None]
        # Views of parameters take no new memory. The storages are kept alive, so that their ids stay unique.
        self._held = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in held)}
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._held or key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self._live += self._sizes[key]
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self._live -= self._sizes.pop(key)


class _AttentionShapes(torch.autograd.Function):
    """Replaces a fused attention kernel: it keeps queries, keys, values and output, but not the scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:3], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _output = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attention_shapes(
    _module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    refuse_unknown(others, dropout=dropout)
    dtype = attention_dtype(query)
    output: Tensor = _AttentionShapes.apply(query.to(dtype), key.to(dtype), value.to(dtype))  # type: ignore[no-untyped-call]
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(_SHAPES_ONLY, _attention_shapes)
