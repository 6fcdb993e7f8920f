"""Cuts the logits into tiles: rows are scored tokens, columns are parts of the vocabulary."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor


class TileSizes(NamedTuple):
    """How many logits are held at a time."""

    entries: int
    """Entries of a tile of some rows and some columns."""
    wide_entries: int
    """Entries of a tile over the whole vocabulary, which lives until its gradients are computed. Fewer than
    about 200 rows make the products slow; more rows only take memory."""
    wide_rows: int
    """Rows of a wide tile that are reduced at a time."""


# On a CPU a tile, and the rows that are reduced at a time, stay in the last-level cache.
_ON_CPU = TileSizes(entries=2**22, wide_entries=2**24, wide_rows=16)
# On a GPU a tile keeps the whole device busy.
_ON_GPU = TileSizes(entries=2**26, wide_entries=2**27, wide_rows=2**12)
_TILE_ROWS = 1024


def pair_blocks(lengths: Sequence[int], hidden: Tensor, *, vocabulary: int) -> Iterator[tuple[slice, slice]]:
    """Slices of consecutive pairs and of their rows, as many as fit a tile over the whole vocabulary.

    Each slice has at least one pair.

    Args:
        lengths: Scored rows of each pair.
        hidden: (S, d) hidden states of the rows.
        vocabulary: Size of the vocabulary.
    """
    most = wide_rows(hidden, vocabulary=vocabulary)
    first = begin = end = 0
    for pair, length in enumerate(lengths):
        if end > begin and end + length - begin > most:
            yield slice(first, pair), slice(begin, end)
            first, begin = pair, end
        end += length
    if end > begin:
        yield slice(first, len(lengths)), slice(begin, end)


def tile_sizes(tensor: Tensor) -> TileSizes:
    """The tile sizes for the device that a tensor is on."""
    return _ON_GPU if tensor.is_cuda else _ON_CPU


def wide_rows(hidden: Tensor, *, vocabulary: int) -> int:
    """Most rows of a tile over the whole vocabulary."""
    return max(1, tile_sizes(hidden).wide_entries // vocabulary)


def tiles(hidden: Tensor, *, vocabulary: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each tile: many rows and few columns, so that the product runs at full speed."""
    entries = tile_sizes(hidden).entries
    rows = max(1, min(len(hidden), _TILE_ROWS, entries))
    columns = max(1, entries // rows)
    for i in range(0, len(hidden), rows):
        for j in range(0, vocabulary, columns):
            yield slice(i, i + rows), slice(j, min(j + columns, vocabulary))
