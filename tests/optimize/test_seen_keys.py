"""The rows that blocks of queries see: those of a plain slice, and their gradients in one sum."""

import pytest
import torch

from dpo_opt.optimize.forward.packing import Segment
from dpo_opt.optimize.forward.seen_keys import Block, query_blocks, seen_by

# A prompt with two completions, one segment alone, and one that shares the first row of that one.
SEGMENTS = (Segment(0, 7, 0, 0), Segment(7, 10, 0, 4), Segment(10, 15, 10, 10), Segment(15, 16, 10, 11))


@pytest.mark.parametrize("most", [1, 2, 3, 100, None])
def test_blocks_cover_every_query_once(most: int | None) -> None:
    blocks = query_blocks(SEGMENTS, most)
    assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(16))
    assert all(block.segment.start <= block.start < block.stop <= block.segment.stop for block in blocks)
    assert max(block.stop - block.start for block in blocks) <= (most or 7)


def sliced(rows: torch.Tensor, block: Block) -> torch.Tensor:
    segment = block.segment
    places = [*range(segment.prefix_start, segment.prefix_stop), *range(segment.start, block.stop)]
    return rows[:, :, places]


@pytest.mark.parametrize("most", [2, 3, None])
def test_each_block_sees_its_prefix_and_its_segment(most: int | None) -> None:
    torch.manual_seed(0)
    rows = torch.randn(1, 2, 16, 3, dtype=torch.float64, requires_grad=True)
    blocks = query_blocks(SEGMENTS, most)
    seen = seen_by(rows, blocks)
    expected = [sliced(rows, block) for block in blocks]
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    # Each by another function: a gradient that went to another row would differ.
    weights = [torch.randn_like(part) for part in expected]
    found, wanted = (
        torch.autograd.grad(sum((part * w).sin().sum() for part, w in zip(parts, weights, strict=True)), rows)
        for parts in (seen, expected)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_rows_without_a_prefix_are_not_copied() -> None:
    rows = torch.randn(1, 2, 16, 3)
    (first, *_) = seen_by(rows, query_blocks(SEGMENTS, None))
    assert first.data_ptr() == rows.data_ptr()
