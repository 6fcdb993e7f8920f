"""Attention of a whole packed batch in one call of torch's flash attention, on a CUDA device.

torch's ``varlen_attn`` takes many runs of consecutive queries, each with its run of consecutive keys, and
aligns the causal diagonal to the bottom right, so that the last query sees the last key. With each segment's
prefix copied before its own keys, this is the attention of a batch with shared prefixes. The gradients of a
prefix add up over its copies.

    H = query heads, K = key-value heads, D = head dimension, T = packed rows, N = gathered keys
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from dpo_opt.optimize.forward.device_path import stands_for_gpu
from dpo_opt.optimize.forward.packing import VarlenIndex

# What flash attention supports. Wider or uneven heads, fp32 and older devices use another kernel.
_DTYPES = (torch.bfloat16, torch.float16)
_WIDEST_HEAD = 256
_HEAD_MULTIPLE = 8
_OLDEST_CAPABILITY = (8, 0)  # Ampere


def varlen_kernel() -> Callable[..., Tensor]:
    """torch's ``varlen_attn`` with grouped heads allowed.

    It needs ``enable_gqa`` for that. 2.11, older than this package asks for, takes grouped heads
    as they are: a GPU machine without a package index has the torch that it has.
    """
    kernel: Any = varlen_attn  # its declared result depends on arguments that are not passed here
    grouped = "enable_gqa" in inspect.signature(kernel).parameters
    return functools.partial(kernel, enable_gqa=True) if grouped else kernel


_KERNEL = varlen_kernel()


def choose_kernel(
    *, capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int, value_dim: int
) -> Literal["varlen", "sdpa"]:
    """Which kernel computes the segments of a batch.

    Args:
        capability: Compute capability of the CUDA device; None on any other device.
        dtype: Dtype that attention is computed in.
        head_dim: D of queries and keys.
        value_dim: D of values.

    Returns:
        ``varlen``: one fused call. ``sdpa``: a call per segment, which works everywhere.
    """
    fused = (
        capability is not None
        and capability >= _OLDEST_CAPABILITY
        and dtype in _DTYPES
        and head_dim == value_dim
        and head_dim <= _WIDEST_HEAD
        and head_dim % _HEAD_MULTIPLE == 0
    )
    return "varlen" if fused else "sdpa"


def takes_varlen(query: Tensor, value: Tensor) -> bool:
    """Whether ``varlen_attention`` computes these heads, (1, H, T, D) and (1, K, T, D), as they are."""
    kernel = choose_kernel(
        capability=_OLDEST_CAPABILITY if stands_for_gpu() else _capability(query.device),
        dtype=attention_dtype(query),
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
    )
    return kernel == "varlen"


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: VarlenIndex,
    *,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Attention of all segments at once.

    Args:
        query: (1, H, T, D).
        key: (1, K, T, D).
        value: (1, K, T, D).
        index: The batch's segments, on the same device.
        scale: Factor of the scores; None: 1 / sqrt(D).
        window: How many positions a row sees, its own included; None: all up to its own.

    Returns:
        (1, T, H, D)
    """
    dtype = attention_dtype(query)
    # Under autocast the rotary embedding leaves fp32 queries and keys; this kernel is not on autocast's list.
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    if index.key_rows is not None:
        k, v = k.index_select(0, index.key_rows), v.index_select(0, index.key_rows)
    out = _KERNEL(
        q,
        k,
        v,
        index.query_starts,
        index.key_starts,
        index.longest_query,
        index.longest_key,
        scale=scale,
        # Numbers of keys to the left and to the right of the diagonal that a query sees.
        window_size=(-1, 0) if window is None else (window - 1, 0),
    )
    return out[None]


def attention_dtype(query: Tensor) -> torch.dtype:
    """Autocast's dtype if it is on, else the queries' own."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        dtype: torch.dtype = torch.get_autocast_dtype(kind)
        return dtype
    return query.dtype


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    """The device's compute capability; None without an NVIDIA GPU or if torch has no flash attention."""
    if device.type != "cuda" or torch.version.hip or not torch.backends.cuda.is_flash_attention_available():
        return None
    return torch.cuda.get_device_capability(device)
