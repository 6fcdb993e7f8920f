"""Ranges of rows of a dataset, as shards need them: ascending ranges are one pass over the files."""

from collections.abc import Iterator

from dpo_opt.precompute.config import DataConfig
from dpo_opt.precompute.read.datasets import BadFile, Row, parse_block, scan_blocks


class RowReader:
    """Reads ranges of rows. A range before the last one starts a new pass over the files."""

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._first = 0
        self._items: list[Row] = []
        self._blocks = self._read()

    def rows(self, start: int, stop: int) -> list[Row]:
        """The rows from ``start`` (included) to ``stop`` (excluded), fewer where the data ends before.

        Raises:
            DataError: A file cannot be read.
        """
        if start < self._first:
            self._rewind()
        found: list[Row] = []
        while True:
            end = self._first + len(self._items)
            wanted = range(max(start, self._first), min(stop, end))
            found += [self._items[row - self._first]._replace(row=row) for row in wanted]
            if stop <= end:
                return found
            self._first, self._items = end, []
            items = next(self._blocks, None)
            if items is None:
                return found
            # A block before the range is only counted, if that needs no parsing.
            ahead, count = items
            if count is not None and end + count <= start:
                self._first = end + count
            else:
                self._items = list(ahead)

    def _rewind(self) -> None:
        self._first, self._items, self._blocks = 0, [], self._read()

    def _read(self) -> Iterator[tuple[Iterator[Row], int | None]]:
        for item in scan_blocks(self._config):
            if isinstance(item, BadFile):
                raise item.error
            block, reading = item
            yield parse_block(block, reading), len(block) if reading.counts_ahead else None
