"""The keys, or values, that each block of queries sees: of the prefix of its segment, and of the segment.

Autograd would give every block a gradient of all rows, nearly all of it zeros, and then add them. Here each
block's gradient is added where it belongs.

    K = key-value heads, D = head dimension, T = packed rows
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_opt.optimize.forward.packing import Segment


class Block(NamedTuple):
    """Consecutive queries of a segment."""

    segment: Segment
    start: int
    stop: int


def query_blocks(segments: Sequence[Segment], most: int | None) -> tuple[Block, ...]:
    """The queries of all segments, ``most`` at a time; None: a segment at a time."""
    return tuple(
        Block(segment, start, min(start + step, segment.stop))
        for segment in segments
        for step in (most or segment.stop - segment.start,)
        for start in range(segment.start, segment.stop, step)
    )


def seen_by(rows: Tensor, blocks: Sequence[Block]) -> tuple[Tensor, ...]:
    """What each block sees up to its last query: (1, K, prefix and own rows, D).

    Args:
        rows: (1, K, T, D).
        blocks: All of every segment, in order.
    """
    seen: tuple[Tensor, ...] = _SeenRows.apply(rows, blocks)  # type: ignore[no-untyped-call]
    return seen


class _SeenRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, blocks: Sequence[Block]) -> tuple[Tensor, ...]:
        ctx.blocks = blocks
        return tuple(_views(rows, blocks))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        shape = list(grads[0].shape)
        shape[2] = ctx.blocks[-1].stop
        total = grads[0].new_zeros(shape)
        for block, grad in zip(ctx.blocks, grads, strict=True):
            start, _, first, last = block.segment
            prefix = last - first
            if prefix:
                total[:, :, first:last] += grad[:, :, :prefix]
            total[:, :, start : block.stop] += grad[:, :, prefix:]
        return total, None


def _views(rows: Tensor, blocks: Sequence[Block]) -> Iterator[Tensor]:
    joined: tuple[Segment, Tensor] | None = None
    for block in blocks:
        start, stop, first, last = segment = block.segment
        if first == last:
            yield rows[:, :, start : block.stop]
            continue
        if joined is None or joined[0] is not segment:
            joined = segment, torch.cat([rows[:, :, first:last], rows[:, :, start:stop]], dim=2)
        yield joined[1][:, :, : last - first + block.stop - start]
