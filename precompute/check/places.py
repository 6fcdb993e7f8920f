"""Where each pair of an audit stands."""

import bisect
import itertools
import zlib
from collections.abc import Sequence


class Places:
    """File and line of every pair, compressed: names of neighbouring lines hardly differ."""

    def __init__(self, blocks: Sequence[tuple[int, bytes]]) -> None:
        self._ends = list(itertools.accumulate(count for count, _ in blocks))
        self._blocks = [names for _, names in blocks]

    def __getitem__(self, pair: int) -> str:
        block = bisect.bisect_right(self._ends, pair)
        names = zlib.decompress(self._blocks[block]).decode("utf-8", errors="surrogateescape").split("\0")
        return names[pair - self._ends[block]]
