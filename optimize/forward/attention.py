"""Exact attention over packed rows that share prompts, registered with transformers; no model is changed.

transformers' own backends would read the jump in position ids as a new document, and silently cut the
rejected completion off from its prompt. Here every segment names its prefix: it sees [prefix, itself] and
nothing else, and no T x T mask is ever built. Because those keys have consecutive positions, a sliding window
counts positions, as it must.

    H = query heads, K = key-value heads, D = head dimension, T = packed rows
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dpo_opt.optimize.forward.device_path import takes_gpu_path
from dpo_opt.optimize.forward.elementwise import recomputed
from dpo_opt.optimize.forward.packing import Segment, VarlenIndex
from dpo_opt.optimize.forward.precision import HALF
from dpo_opt.optimize.forward.seen_keys import query_blocks, seen_by
from dpo_opt.optimize.forward.varlen import attention_dtype, takes_varlen, varlen_attention
from dpo_opt.optimize.forward.written_attention import written_attention

SEGMENT_ATTENTION = "dpo_opt_segments"
"""Name of the attention for packed rows."""
PADDED_ATTENTION = "dpo_opt_padded"
"""Name of the attention for padded rows: torch's kernel, and a refusal of features that it lacks."""
STOCK_ATTENTION = "eager"
"""Name of transformers' own attention, written out in each model's file: it defines the right result."""
# Arguments that transformers passes to an attention and that do not change its result: the layout of the
# batch, what a cache or another kernel needs, and which outputs are returned.
_WITHOUT_EFFECT = {
    *("position_ids", "cache_position", "segments", "varlen", "layer_idx", "layer_type", "is_training"),
    *("use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "num_items_in_batch"),
    *("position_embeddings", "past_key_values", "deterministic", "logits_to_keep", "output_mtp_logits"),
}
_KEPT_ENTRIES = 2**20
# Queries per call on a CPU, where torch's kernel skips later keys only in blocks of 512.
_CPU_ROWS = 64


def segment_attention(
    module: torch.nn.Module,
    query: Tensor,  # (1, H, T, D)
    key: Tensor,  # (1, K, T, D)
    value: Tensor,  # (1, K, T, D)
    attention_mask: Tensor | None,
    *,
    segments: tuple[Segment, ...],
    varlen: VarlenIndex | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention output (1, T, H, D), in the form that transformers' ``AttentionInterface`` expects.

    ``varlen`` describes the same segments for the fused kernel of a CUDA device. Soft-capped scores
    (``softcap``) and sinks (``s_aux``, (H,)) are transformers' arguments; no fused kernel has them.

    Raises:
        NotImplementedError: The model needs something that this kernel would ignore (a bias, its own mask),
            or applies its sliding window in a mask, and no mask is built here. ``load_policy`` detects such
            models and uses padded rows.
    """
    refuse_unknown(others, dropout=dropout)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if attention_mask is not None or not is_causal:
        raise NotImplementedError("segment attention is causal and has no masks")
    if sliding_window is None and _is_windowed(module):
        raise NotImplementedError("the layer has a sliding window and does not pass it on")
    _note_call(module)
    written = softcap is not None or s_aux is not None
    if varlen is not None and not written and takes_varlen(query, value):
        return varlen_attention(query, key, value, varlen, scale=scaling, window=sliding_window), None
    grouped = query.shape[1] != key.shape[1]
    if grouped and takes_gpu_path(query.device) and not written:
        # On CUDA the only kernel for grouped heads with fp32 or a mask keeps all scores for backward.
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        grouped = False
    dtype = attention_dtype(query)
    if dtype in HALF and not written and not takes_gpu_path(query.device):
        # A CPU's kernel takes a third less time in fp32 than in bf16.
        query, key, value = (x.float() for x in (query, key, value))
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] = (
        functools.partial(written_attention, scale=scaling, softcap=softcap, sinks=s_aux)
        if written
        else functools.partial(_fused_attention, scale=scaling, grouped=grouped)
    )
    blocks = query_blocks(segments, None if takes_gpu_path(query.device) else _CPU_ROWS)
    # Split, not sliced: autograd then assembles the gradient of T rows once, not once per block.
    queries = torch.split(query, [block.stop - block.start for block in blocks], dim=2)
    outputs = []
    for q, k, v in zip(queries, seen_by(key, blocks), seen_by(value, blocks), strict=True):
        mask = _block_mask(q.shape[2], k.shape[2], sliding_window, always=written, device=q.device)
        outputs.append(attend(q, k, v, mask))
    # The kernel keeps the parts. The next product need not keep them once more.
    return recomputed(functools.partial(_joined, dtype), outputs), None


def _joined(dtype: torch.dtype, *parts: Tensor) -> Tensor:
    """(1, T, H, D) of parts along T, (1, H, rows, D) each."""
    return torch.cat(parts, dim=2).to(dtype).transpose(1, 2).contiguous()


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float | None, grouped: bool
) -> Tensor:
    # On a CPU autocast would round what was widened.
    plain = not takes_gpu_path(query.device)
    with torch.autocast(query.device.type, enabled=False) if plain else contextlib.nullcontext():
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )


def _block_mask(
    rows: int, stop: int, window: int | None, *, always: bool, device: torch.device
) -> Tensor | None:
    """The mask of a segment's queries up to ``stop``; None where the kernel's own causal one will do."""
    windowed = window is not None and stop > window
    if not (stop > rows or windowed or always):
        return None
    # All layers of one forward need the same masks; large ones cost less to make than to keep.
    make = _kept_mask if rows * stop <= _KEPT_ENTRIES else _mask
    return make(rows, stop, window if windowed else None, device)


def _mask(rows: int, columns: int, window: int | None, device: torch.device) -> Tensor:
    """(rows, columns) bool, true if a query sees a key: row i is at position columns - rows + i."""
    offset = columns - rows
    mask = torch.ones(rows, columns, dtype=torch.bool, device=device).tril(offset)
    # A query sees its own position and the window - 1 positions before it.
    return mask if window is None else mask.triu(offset - window + 1)


_kept_mask = functools.lru_cache(maxsize=64)(_mask)


@contextlib.contextmanager
def without_kept_masks() -> Iterator[None]:
    """No mask that was made before the block is used in it, and none of the block's after it."""
    _kept_mask.cache_clear()
    try:
        yield
    finally:
        _kept_mask.cache_clear()


def _is_windowed(module: torch.nn.Module) -> bool:
    """Whether the configuration gives this layer a window, which may be longer than the check at loading."""
    config = getattr(module, "config", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        return bool(layer_types[module.layer_idx] == "sliding_attention")
    return getattr(config, "sliding_window", None) is not None


def padded_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention through torch's kernel, or written out. The mask holds padding and window.

    Raises:
        NotImplementedError: The model needs something that the kernel silently ignores.
    """
    refuse_unknown(others, dropout=dropout)
    _note_call(module)
    if softcap is not None or s_aux is not None:
        if attention_mask is None:
            attention_mask = _mask(query.shape[2], key.shape[2], None, query.device)
        written = written_attention(
            query, key, value, attention_mask, scale=scaling, softcap=softcap, sinks=s_aux
        )
        return written.transpose(1, 2).contiguous(), None
    output: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal
    )
    return output


def refuse_unknown(others: Mapping[str, Any], *, dropout: float) -> None:
    """Check the arguments that a model passes besides tensors, scale, window and causality.

    Raises:
        NotImplementedError: The model needs what this kernel does not have.
    """
    unknown = sorted(n for n, value in others.items() if value is not None and n not in _WITHOUT_EFFECT)
    if dropout:
        unknown.append("dropout")
    if unknown:
        raise NotImplementedError(f"the attention has no {', '.join(unknown)}")


_calls: list[torch.nn.Module] | None = None


@contextlib.contextmanager
def attention_calls() -> Iterator[list[torch.nn.Module]]:
    """The modules that call one of this file's attentions while the block runs, in order."""
    global _calls
    found: list[torch.nn.Module] = []
    _calls = found
    try:
        yield found
    finally:
        _calls = None


def _note_call(module: torch.nn.Module) -> None:
    if _calls is not None:
        _calls.append(module)


AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
AttentionInterface.register(PADDED_ATTENTION, padded_attention)
AttentionMaskInterface.register(PADDED_ATTENTION, sdpa_mask)
