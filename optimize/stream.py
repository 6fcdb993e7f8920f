"""Which pairs make up each optimizer step, and how their rows get into memory.

The order is a pure function of (seed, epoch) and the index: shards are shuffled by row group, then
rows within a window of row groups. So reads stay local, memory does not grow with the dataset, and the
state of the data order is one number.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from dpo_opt.schemas.columns import COLUMNS, WEIGHT, read_column
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.manifest import ShardFolder
from dpo_opt.schemas.pairs import ScoredPair

# Row groups that are shuffled together: 16 x 128 rows decorrelate a sorted file, and fit in memory.
WINDOW_GROUPS = 16

Positions = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float64]


class PairStream:
    """Random access to the pairs of a folder, split by prompt into training and evaluation."""

    def __init__(self, folder: ShardFolder, *, eval_split: float) -> None:
        """Read the index.

        Args:
            folder: Where the shards are.
            eval_split: Share of prompts that is held out, decided by each prompt's own hash, so that no
                prompt stands on both sides and growing the dataset moves no prompt.

        Raises:
            DataError: The index or a column beside it is damaged, or all weights are 0.
        """
        index = folder.index()
        self._folder = folder
        self._shards = index["shard"].to_numpy()
        self._groups = index["row_group"].to_numpy()
        self._rows = index["row"].to_numpy()
        starts = np.flatnonzero(
            (np.diff(self._shards, prepend=-1) != 0) | (np.diff(self._groups, prepend=-1) != 0)
        )
        self._blocks: list[Positions] = np.split(np.arange(len(index)), starts[1:])
        self._block_of = np.repeat(np.arange(len(starts)), [len(b) for b in self._blocks])
        held_out = np.array([_unit_interval(p) < eval_split for p in index["prompt_id"].to_pylist()], bool)
        self._held_out = held_out
        self.train_size = int((~held_out).sum())
        self.eval_positions: Positions = np.flatnonzero(held_out)
        self._weights = self._normalised_weights(
            read_column(folder.path, WEIGHT, rows=self._rows, default=1.0)
        )
        self._cache: OrderedDict[int, list[ScoredPair]] = OrderedDict()

    def epoch(self, *, seed: int, epoch: int) -> Positions:
        """The training pairs of one epoch, as positions in the index, in order."""
        rng = np.random.default_rng([seed, epoch])
        blocks = rng.permutation(len(self._blocks))
        parts = []
        for i in range(0, len(blocks), WINDOW_GROUPS):
            window = np.concatenate([self._blocks[b] for b in blocks[i : i + WINDOW_GROUPS]])
            parts.append(rng.permutation(window[~self._held_out[window]]))
        return np.concatenate(parts)

    def fetch(self, positions: Sequence[int] | Positions) -> list[ScoredPair]:
        """The pairs at these positions, in order."""
        found = []
        for position in positions:
            block = int(self._block_of[position])
            found.append(self._block(block)[int(position - self._blocks[block][0])])
        return found

    def weights(self, pairs: Sequence[ScoredPair]) -> list[float] | None:
        """How much each pair counts in the loss, 1 on average over the training pairs; None: all alike."""
        if self._weights is None:
            return None
        places = np.searchsorted(self._rows, [pair.row for pair in pairs])
        return [float(weight) for weight in self._weights[places]]

    def _normalised_weights(self, weights: Weights | None) -> Weights | None:
        """Weights whose scale does not change the learning rate's meaning."""
        if weights is None:
            return None
        mean = weights[~self._held_out].mean() if self.train_size else 1.0
        if not mean > 0:
            raise DataError(
                "the weights of all training pairs are 0",
                where=str(self._folder.path / COLUMNS / f"{WEIGHT}.parquet"),
                why="nothing would be learnt",
                fix="correct the file, or remove it to let all pairs count alike",
            )
        return weights / mean

    def batches(self, positions: Positions, size: int) -> Iterator[list[ScoredPair]]:
        """Consecutive batches; the last may be smaller."""
        for i in range(0, len(positions), size):
            yield self.fetch(positions[i : i + size])

    def _block(self, block: int) -> list[ScoredPair]:
        if block in self._cache:
            self._cache.move_to_end(block)
            return self._cache[block]
        first = int(self._blocks[block][0])
        shard, group = int(self._shards[first]), int(self._groups[first])
        (pairs,) = self._folder.row_groups(shard, row_groups=[group])
        self._cache[block] = pairs
        # One more than a window, so that neither training order nor a straddling batch reads twice.
        while len(self._cache) > WINDOW_GROUPS + 1:
            self._cache.popitem(last=False)
        return pairs


def _unit_interval(prompt_id: str) -> float:
    return int(prompt_id[:8], 16) / 2**32
