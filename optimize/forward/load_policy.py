"""Loads a policy from a model folder: requires every weight and finds the layout that is exact for it."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from dpo_opt.optimize.forward.architecture import auto_class, decoder_of, model_without_weights
from dpo_opt.optimize.forward.layout import choose_layout, use_attention
from dpo_opt.optimize.forward.narrow_linear import round_weights_at_use
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.forward.precision import HALF, narrow_products
from dpo_opt.optimize.forward.probe import Probe, require_same_in_compute_dtype
from dpo_opt.optimize.forward.stored_weights import StoredWeights, find_stored
from dpo_opt.optimize.forward.tied_gradients import sum_tied_gradients
from dpo_opt.schemas.errors import ConfigError, first_line
from dpo_opt.schemas.model_config import load_model_config, model_errors
from dpo_opt.schemas.models import context_length
from dpo_opt.schemas.rope import pin_rope
from dpo_opt.schemas.weights import refuse_left_over

Layout = tuple[bool, Probe]
"""Whether batches are packed, and what was compared."""


def load_policy(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trainable: bool,
    max_length: int | None = None,
    param_dtype: torch.dtype | None = torch.float32,
    options: Mapping[str, Any] | None = None,
) -> Policy:
    """Load a model from safetensors.

    Args:
        folder: Model folder in the Hugging Face layout.
        dtype: Compute dtype.
        device: The device to load the model on.
        trainable: Whether these weights will be trained. Of a model that also takes images or sound, only the
            text model's are.
        max_length: Most tokens of a sequence in this run, which some rotary embeddings depend on
            (``schemas.rope``); None: the model's context.
        param_dtype: Dtype that parameters are stored in. None: in half precision where that changes no
            log-prob, else in fp32. Quantized weights stay quantized.
        options: More arguments of ``from_pretrained``; a ``device_map`` among them replaces ``device``.

    Raises:
        ConfigError: transformers cannot load the folder, weights are missing or left over, or no layout is
            exact.
    """
    config, longest = _configuration(folder, max_length, trainable=trainable)
    quantized = bool(getattr(config, "quantization_config", None))
    try:
        with _quiet_transformers():
            model, report = auto_class(config).from_pretrained(
                folder,
                config=config,
                dtype=dtype if quantized else param_dtype or torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                **(options or {}),
            )
    except model_errors() as error:
        raise ConfigError(
            f"transformers cannot load the model ({first_line(error)})",
            where=str(folder),
            why="every log-prob would come from this model",
            fix="copy or download the model again, config.json and weights",
        ) from error
    _require_all_weights(report, folder)
    if param_dtype is None and dtype in HALF and not quantized:
        narrow_products(model, dtype)
    if not options or "device_map" not in options:
        model.to(device)
    # Dropout must be off: the reference was scored without it, so with it policy != reference at step 0.
    model.eval()
    model.requires_grad_(False)
    packs, probe = choose_layout(model, device, dtype, folder=folder, longest=longest)
    if trainable:
        make_trainable(model, dtype)
    policy = Policy(model, device, dtype, packs, probe)
    require_same_in_compute_dtype(policy, where=str(folder))
    return policy


class UnreadPolicy(NamedTuple):
    """A policy whose parameters have no numbers yet, on the ``meta`` device, and where these lie."""

    policy: Policy
    weights: StoredWeights


def lay_out_policy(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trainable: bool,
    max_length: int | None,
    param_dtype: torch.dtype,
    once: Callable[[Callable[[], Layout]], Layout],
) -> UnreadPolicy | str:
    """The policy that ``load_policy`` gives, before its weights are read; or why there is none, in words.

    Finding its layout reads them, a layer at a time. The layout is not compared in the compute dtype.

    Args:
        folder: See ``load_policy``, as for the others.
        once: Does a piece of work on one of the processes that load this policy, and gives all its result.

    Raises:
        ConfigError: No layout is exact, or a file is damaged. What else ``load_policy`` refuses is not
            looked for where there are words.
    """
    config, longest = _configuration(folder, max_length, trainable=trainable)
    if getattr(config, "quantization_config", None):
        return "its weights are quantized"
    model = model_without_weights(folder, config=config, dtype=param_dtype)
    weights = find_stored(model, folder)
    if isinstance(weights, str):
        return weights
    weights.fill_buffers(device)
    model.requires_grad_(False)

    def measured() -> Layout:
        with weights.while_used(device):
            return choose_layout(model, device, dtype, folder=folder, longest=longest)

    packs, probe = once(measured)
    use_attention(model, probe.attention)
    if trainable:
        make_trainable(model, dtype)
    return UnreadPolicy(Policy(model, device, dtype, packs, probe), weights)


def _configuration(
    folder: Path, max_length: int | None, *, trainable: bool
) -> tuple[PretrainedConfig, int | None]:
    """The model's configuration for a run, and the most tokens of a sequence, if that is known.

    Raises:
        ConfigError: The model cannot be trained.
    """
    config = load_model_config(folder)
    if trainable and getattr(config, "quantization_config", None):
        raise ConfigError(
            "the checkpoint's weights are quantized",
            where=str(folder),
            why="training updates are far smaller than the gaps between quantized numbers",
            fix="train the model that it was quantized from, or only an adapter (--use-peft)",
        )
    longest = max_length or context_length(folder)
    _refuse_chosen_keys(config, longest, folder)
    return config if longest is None else pin_rope(config, longest), longest


def make_trainable(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let the weights of the text model train, and not those of image and audio parts."""
    for part in (decoder_of(model), model.get_output_embeddings()):
        part.requires_grad_(True)
    sum_tied_gradients(model)
    if dtype in HALF:
        round_weights_at_use(decoder_of(model), dtype)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide transformers' progress bars, and its table of missing weights, which an error here replaces."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _require_all_weights(report: Mapping[str, Any], folder: Path) -> None:
    """Require that checkpoint and model have the same weights, except those the model class ignores.

    Raises:
        ConfigError: One has a weight that the other lacks, or of another shape.
    """
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigError(
            f"the checkpoint lacks {len(missing)} of the model's weights, such as {missing[0]}",
            where=str(folder),
            why="transformers fills them with random numbers",
            fix="copy the whole model, or save it again from the model that was trained",
        )
    if report["mismatched_keys"]:
        name, stored, wanted = min(report["mismatched_keys"])
        raise ConfigError(
            f"the checkpoint's {name} has shape {tuple(stored)}, but config.json gives it {tuple(wanted)}",
            where=str(folder),
            why="transformers fills such weights with random numbers",
            fix="correct config.json (vocabulary, heads, widths) until it fits the weights, or copy it again",
        )
    refuse_left_over(report["unexpected_keys"], folder=folder)


def _refuse_chosen_keys(config: PretrainedConfig, longest: int | None, folder: Path) -> None:
    """Refuse sparse attention on long sequences.

    Attention to only the best k keys is exact up to k tokens. Beyond that, rounding decides which keys are
    the best.

    Raises:
        ConfigError: The shards allow sequences of more than k tokens.
    """
    most = getattr(config.get_text_config(), "index_topk", None)
    if most and longest is not None and longest > most:
        raise ConfigError(
            f"the model attends only to its {most} best keys, but sequences of {longest} tokens are allowed",
            where=str(folder),
            why="rounding decides which keys these are, so two forwards of one sequence differ by whole nats",
            fix=f"score again with `dpo-opt precompute --max-length {most}` or less, and use those shards",
        )
