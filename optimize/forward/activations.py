"""Activation checkpointing: saves memory by computing parts of the forward again in backward.

transformers' own switch works only in training mode, and training mode would switch dropout on. So each
layer's forward is wrapped here. Log-probs and gradients are exactly those of the plain forward.
"""

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_opt.optimize.forward.varlen import OPERATION
from dpo_opt.schemas.errors import ConfigError

_aten = torch.ops.aten
# Results that are costly to recompute and small to keep: products with weights, and fused attention. A plain
# batched product is not kept, because in eager attention it makes the (T, T) scores.
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._grouped_mm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._flash_attention_forward.default,
    OPERATION,
}


def checkpoint_activations(model: PreTrainedModel, mode: Literal["none", "selective", "full"]) -> None:
    """Let the decoder layers recompute in backward. Log-probs and gradients stay exactly the same.

    Args:
        model: Changed in place. Call this only once per model.
        mode: ``full`` keeps only each layer's input. ``selective`` also keeps the outputs of matrix products
            and attention, and recomputes only norms, rotary embeddings and activation functions. ``none``
            changes nothing.

    Raises:
        ConfigError: transformers does not say which modules of this model are its layers.
    """
    if mode == "none":
        return
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} does not support activation checkpointing",
            fix="train with --activation-checkpointing none, and a smaller --micro-batch-tokens",
        )
    for layer in layers:
        kept = _KEPT
        if any(getattr(module, "has_bias", False) for module in layer.modules()):
            # transformers adds the bias of experts into their product, which a kept result must not suffer.
            kept = _KEPT - {_aten._grouped_mm.default}
        layer.forward = partial(_recomputed, layer.forward, mode, kept)


def _recomputed(
    forward: Callable[..., Any], mode: str, kept: AbstractSet[Any], *args: Any, **kwargs: Any
) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    contexts: dict[str, Any] = (
        {"context_fn": partial(_selective_contexts, kept)} if mode == "selective" else {}
    )
    # There is no dropout, so there is no random state to restore.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **contexts, **kwargs)


def _selective_contexts(kept: AbstractSet[Any]) -> Any:
    return create_selective_checkpoint_contexts(partial(_policy, kept))  # type: ignore[no-untyped-call]


def _policy(
    kept: AbstractSet[Any], _context: Any, operation: Any, *_args: Any, **_kwargs: Any
) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE
