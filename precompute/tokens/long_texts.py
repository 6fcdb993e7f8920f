"""Ids of a very long text, in memory for a part of it: exactly those of the whole text.

The engine of ``tokenizers`` needs 100 to 300 bytes for each character of a text that it encodes. Here it
encodes windows that overlap, and their ids are joined where two windows agree. Windows agree at a place if
both begin a token there and have the same tokens on both sides of it, for ``_AGREED`` characters.

Why that is exact: byte pair encoding of a text is the one sequence of tokens whose every two neighbours are
the encoding of their own text. Of the joined ids any two neighbours stand in one window side by side. What
cuts a text into words before looks no further than a run of like characters, and the place of a joint is one
sign between letters, where no run goes on. A text without such a place is encoded in larger windows, in the
end whole.
"""

import re
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpo_opt.schemas.pairs import IdArray

LONGEST_PIECE = 2**23
"""Characters that are encoded as one; the engine takes up to 2.5 GB for them."""

_WINDOW = 2**16  # characters
_OVERLAP = 2**12
_AGREED = 2**9
# A space, a comma, a full stop of any script. Digits may be grouped from the end of their run.
_BETWEEN_LETTERS = re.compile(r"(?<=[^\W\d_])[\W_](?=[^\W\d_])")


class _Window(NamedTuple):
    ids: IdArray
    starts: NDArray[np.int64]
    """Where each token begins in the whole text, in characters."""
    ends: NDArray[np.int64]
    stop: int
    """Where the window ends in the whole text."""


def long_text_ids(text: str, engine: Any) -> IdArray | None:
    """The ids of a text without special tokens, as of one call; None if that is beyond any memory.

    Args:
        text: Of any length.
        engine: A fast tokenizer's backend without a postprocessor, which might move offsets.
    """
    model = engine.model
    first = _WINDOW if type(model).__name__ == "BPE" and not model.dropout else len(text)
    pieces: list[IdArray] = []
    begin, size, joint = 0, first, 0
    while True:
        if min(size, len(text) - begin) > LONGEST_PIECE:
            return None
        left = _encoded(text, begin, size, engine)
        found = None
        while left.stop < len(text):
            begin_right = left.stop - _OVERLAP
            right = _encoded(text, begin_right, first, engine)
            found = _place_of_agreement(text, left, right, begin_right)
            if found is None:
                break
            pieces.append(_between(left, joint, found))
            begin, size, joint, left = begin_right, first, found, right
        if left.stop == len(text):
            joined: IdArray = np.concatenate([*pieces, _between(left, joint, len(text) + 1)])
            return joined
        size *= 2


def _encoded(text: str, begin: int, size: int, engine: Any) -> _Window:
    encoding = engine.encode(text[begin : begin + size], add_special_tokens=False)
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) + begin
    ids = np.array(encoding.ids, dtype=np.int32)
    return _Window(ids, offsets[:, 0], offsets[:, 1], min(begin + size, len(text)))


def _between(window: _Window, start: int, stop: int) -> IdArray:
    first, last = np.searchsorted(window.starts, [start, stop])
    return window.ids[first:last].copy()


def _place_of_agreement(text: str, left: _Window, right: _Window, begin: int) -> int | None:
    if (np.diff(left.starts) < 0).any() or (np.diff(right.starts) < 0).any():
        return None
    for match in _BETWEEN_LETTERS.finditer(text, begin + 2 * _AGREED, left.stop - 2 * _AGREED):
        around = [_around(window, match.start()) for window in (left, right)]
        if around[0] is not None and around[0] == around[1]:
            return match.start()
    return None


def _around(window: _Window, place: int) -> tuple[bytes, bytes] | None:
    """The tokens on both sides of a place, and where they begin; None where no token begins there."""
    at = int(np.searchsorted(window.starts, place))
    if at == len(window.starts) or window.starts[at] != place or (at and window.ends[at - 1] > place):
        return None
    first, last = np.searchsorted(window.starts, [place - _AGREED, place + _AGREED])
    return window.ids[first:last].tobytes(), window.starts[first:last].tobytes()
