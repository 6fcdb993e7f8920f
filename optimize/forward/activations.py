"""Activation checkpointing: saves memory by computing parts of the forward again in backward.

transformers' own switch works only in training mode, and training mode would switch dropout on. So each
layer's forward is wrapped here. Log-probs are exactly those of the plain forward.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_opt.optimize.forward.elementwise import recompute_elementwise
from dpo_opt.schemas.errors import ConfigError


def checkpoint_activations(model: PreTrainedModel, mode: Literal["none", "selective", "full"]) -> None:
    """Let the decoder layers recompute in backward. Log-probs stay exactly the same.

    Gradients do too with ``full``, and within rounding with ``selective``.

    Args:
        model: Changed in place. Call this only once per model.
        mode: ``full`` keeps only each layer's input. ``selective`` keeps the outputs of matrix products and
            attention, and recomputes norms, activation functions and gates. ``none`` changes nothing.

    Raises:
        ConfigError: transformers does not say which modules of this model are its layers.
    """
    if mode == "none":
        return
    if mode == "selective":
        recompute_elementwise(model)
        return
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} does not support activation checkpointing",
            fix="train with --activation-checkpointing none, and a smaller --micro-batch-tokens",
        )
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # There is no dropout, so there is no random state to restore.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
