"""Chooses packed or padded batches for a model: the first layout whose log-probs are the model's own.

Each layout is tried on probe sequences (probe.py) when the model is loaded.
"""

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_opt.optimize.forward.architecture import decoder_layers, decoder_of, projection_of
from dpo_opt.optimize.forward.attention import (
    PADDED_ATTENTION,
    SEGMENT_ATTENTION,
    STOCK_ATTENTION,
    attention_calls,
)
from dpo_opt.optimize.forward.packing import Group
from dpo_opt.optimize.forward.precision import HALF, full_precision_products, in_fp32
from dpo_opt.optimize.forward.probe import (
    EXACT_WITHIN,
    HALF_MAX,
    SUPPORTED,
    Probe,
    no_numbers,
    not_finite_in,
    questions,
    stock_answers,
    stock_logps,
)
from dpo_opt.schemas.errors import ConfigError, first_line
from dpo_opt.schemas.pairs import TokenSequence

if TYPE_CHECKING:
    from dpo_opt.optimize.forward.policy import Policy

# Names in configurations of limits on what a row sees that are applied only in masks.
_OTHER_LIMITS = ("attention_chunk_size",)
# Whether rows are packed, and the attention, in the order in which they are tried.
_LAYOUTS = ((True, SEGMENT_ATTENTION), (False, PADDED_ATTENTION), (False, STOCK_ATTENTION))


def choose_layout(
    model: PreTrainedModel,
    device: torch.device,
    dtype: torch.dtype,
    *,
    folder: Path,
    longest: int | None = None,
) -> tuple[bool, Probe]:
    """Find the layout that gives the model's own log-probs; packed is tried before padded.

    Leaves the model with the attention that the layout needs.

    Args:
        model: On its device.
        device: The model's device.
        dtype: The dtype that it will compute in.
        folder: The folder it was loaded from, for messages.
        longest: Most tokens of a sequence, if that is known.

    Returns:
        Whether batches are packed, and what was compared.

    Raises:
        ConfigError: No layout gives the model's own log-probs, or these are not finite.
    """
    groups, changed = questions(model, longest)
    use_attention(model, STOCK_ATTENTION)
    with torch.no_grad(), full_precision_products(), contextlib.ExitStack() as stack:
        rounded = stock_answers(model, groups, device, dtype)
        if (dtype != torch.float32 or _holds_half(model)) and _has_fp32_forward(model):
            stack.enter_context(in_fp32(model))
            expected = stock_answers(model, groups, device, torch.float32)
        else:
            expected = rounded
        if not torch.isfinite(expected).all():
            raise no_numbers(folder)
        if not torch.isfinite(rounded).all():
            raise not_finite_in(dtype, str(folder))
        rounding = (rounded - expected).abs()
        probe = Probe(groups, changed, expected, float(rounding.mean()), float(rounding.max()))
        reasons = []
        for packs, attention in _LAYOUTS:
            if packs and (unknown := _unknown_layers(model)):
                reasons.append(f"packed rows have no {', '.join(unknown)}")
                continue
            if not use_attention(model, attention):
                continue
            reason = _difference(model, device, probe, packs=packs)
            if reason is None:
                return packs, probe._replace(attention=attention)
            reasons.append(reason)
        reasons += _what_is_unknown(model, probe, device)
    raise ConfigError(
        f"the log-probs of {type(model).__name__} cannot be reproduced from its hidden states "
        f"({reasons[-1]})",
        where=str(folder),
        why="its decoder or head does something that is not supported, so every log-prob would be wrong",
        fix=f"train {SUPPORTED}",
    )


def layout_by_structure(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> bool | None:
    """The first layout that the model runs in. Its log-probs are not compared, so it may have no weights.

    Leaves the model with the attention that the layout needs.

    Args:
        model: Its tensors may be without data.
        device: The model's device.
        dtype: The dtype that it will compute in.

    Returns:
        Whether batches are packed; None if the model runs in no layout.

    Raises:
        ConfigError: The model has no head that is one matrix.
    """
    from dpo_opt.optimize.forward.policy import Policy

    groups, _ = questions(model, None)
    for packs, attention in _LAYOUTS:
        if (packs and _unknown_layers(model)) or not use_attention(model, attention):
            continue
        with torch.no_grad():
            found = _logps_in_layout(Policy(model, device, dtype, packs), groups)
        if not isinstance(found, str):
            return packs
    return None


def _what_is_unknown(model: PreTrainedModel, probe: Probe, device: torch.device) -> list[str]:
    """Why no layout gives the model's own log-probs, in words; empty if the reason is not known."""
    if not _is_causal(model, probe, device):
        return ["later tokens change the log-probs of earlier ones: it is not causal"]
    read: list[Tensor] = []
    hook = projection_of(model).register_forward_pre_hook(lambda _, args: read.append(args[0]))
    ids = torch.from_numpy(probe.groups[0][0].prompt_ids.astype(np.int64)).to(device)[None]
    try:
        model(input_ids=ids, use_cache=False)
        hidden = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return []
    finally:
        hook.remove()
    if not read or read[0].shape != hidden.shape or (read[0] - hidden).abs().max() > EXACT_WITHIN:
        return ["it has other layers between its decoder and its head"]
    return ["its logits are not what its head and its configuration say"]


def _is_causal(model: PreTrainedModel, probe: Probe, device: torch.device) -> bool:
    """Whether a sequence's first log-probs are the same without its last tokens."""
    sequence = probe.groups[0][1]
    cut = TokenSequence(sequence.prompt_ids, sequence.completion_ids[:2])
    first = stock_logps(model, sequence, device)[:2]
    return bool(((first - stock_logps(model, cut, device)).abs() <= EXACT_WITHIN).all())


def _difference(model: PreTrainedModel, device: torch.device, probe: Probe, *, packs: bool) -> str | None:
    """Why a layout does not give the model's own log-probs, in words; None if it does."""
    from dpo_opt.optimize.forward.policy import Policy

    found = _logps_in_layout(Policy(model, device, _dtype(model), packs), probe.groups)
    if isinstance(found, str):
        return found
    difference = (found - probe.expected).abs()
    limit = difference.new_tensor(EXACT_WITHIN if _dtype(model) == torch.float32 else HALF_MAX)
    if not bool((difference <= limit).all()):
        return f"off by up to {float(difference.max()):.3g} nats per token"
    return None


def _logps_in_layout(policy: "Policy", groups: Sequence[Group]) -> Tensor | str:
    """All log-probs in the policy's layout, on the CPU, or why there are none, in words.

    Packed rows are right only if nothing except our attention mixes them, so every layer must call it.
    """
    try:
        with attention_calls() as calls:
            found = torch.cat(policy.sequence_logps(groups)).float().cpu()
    except torch.OutOfMemoryError:
        raise
    except (
        AttributeError,
        IndexError,
        KeyError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        # The model does not accept this layout's arguments, or does not expose its decoder.
        return first_line(error)
    if policy.packs and (idle := _layers_without(calls, policy.model)):
        return f"{idle} layers do not use the attention of packed rows"
    return found


def _unknown_layers(model: PreTrainedModel) -> list[str]:
    """Kinds of layers in the configuration that packed rows do not support.

    The configuration decides, because a limit longer than the probe's sequences would show in no number.
    """
    text = model.config.get_text_config()
    found = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    found |= {name for name in _OTHER_LIMITS if getattr(text, name, None)}
    return sorted(found)


def _layers_without(calls: Iterable[torch.nn.Module], model: PreTrainedModel) -> int:
    asked = {id(module) for module in calls}
    layers = list(decoder_layers(decoder_of(model)))
    if not layers:
        return 1
    return sum(all(id(module) not in asked for module in layer.modules()) for layer in layers)


def use_attention(model: PreTrainedModel, name: str) -> bool:
    """Switch the decoder to an attention. Returns whether it now uses it."""
    decoder: Any = decoder_of(model)
    try:
        decoder.set_attn_implementation(name)
    except (AttributeError, ImportError, ValueError):
        # The model does not use transformers' interface and has only its own attention.
        return name == STOCK_ATTENTION
    return True


def _dtype(model: PreTrainedModel) -> torch.dtype:
    dtype: torch.dtype = projection_of(model).weight.dtype
    return dtype


def _holds_half(model: PreTrainedModel) -> bool:
    return any(tensor.dtype in HALF for tensor in (*model.parameters(), *model.buffers()))


def _has_fp32_forward(model: PreTrainedModel) -> bool:
    return all(p.dtype in (*HALF, torch.float32) for p in model.parameters())
