"""The data order: which pairs make up each optimizer step, which prompts are held out, and reading the rows.

The order is a pure function of (seed, epoch) and the index. Row groups are shuffled first, then rows within a
window of row groups. So reads stay local, memory does not grow with the dataset, and the state of the data
order is one number: how many pairs were consumed.
"""

import contextlib
import hashlib
import itertools
import math
import threading
from collections.abc import Generator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dpo_opt.optimize.read_ahead import read_ahead
from dpo_opt.schemas.arrow_numbers import numbers
from dpo_opt.schemas.errors import ConfigError, DataError, quoted
from dpo_opt.schemas.pairs import ScoredPair
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.sidecars import MARGIN, WEIGHT, column_path, own_file

# Row groups that are shuffled together: 16 x 128 rows decorrelate a sorted file, and fit in memory.
WINDOW_GROUPS = 16
# Row groups read ahead: the whole next window, because its first pairs come from all over it.
_AHEAD_GROUPS = WINDOW_GROUPS

Positions = npt.NDArray[np.int32]
Values = npt.NDArray[np.float64]


class PairStream:
    """The pairs of a folder, split by prompt into training and evaluation, in the order they are used."""

    def __init__(
        self, folder: ShardFolder, *, eval_split: float, by_prompt: bool = False, margins: bool = False
    ) -> None:
        """Read the index.

        Args:
            folder: The shards.
            eval_split: Share of prompts that is held out, decided by each prompt's hash. So no prompt is in
                both parts, and growing the dataset moves no prompt. 1 holds out all.
            by_prompt: Draw whole prompts: the pairs of a prompt stand next to each other in the order, and a
                step takes all of them or none, unless they are more than a step's pairs. It holds for pairs
                within a window of row groups, as those that were scored together are.
            margins: Whether a loss reads the margins of the data.

        Raises:
            ConfigError: A loss reads margins, and a pair has none.
            DataError: The index or a column is damaged, a weight is negative or not a number, all weights
                are 0, or their sum is infinite.
        """
        self._folder = folder
        index = folder.index(["row", "shard", "row_group"])
        shards, groups = numbers(index["shard"]), numbers(index["row_group"])
        starts = np.flatnonzero((np.diff(shards, prepend=-1) != 0) | (np.diff(groups, prepend=-1) != 0))
        # A block is a row group: its pairs are at positions bounds[block] to bounds[block + 1].
        self._bounds: Positions = np.append(starts, len(index)).astype(np.int32)
        self._shards, self._groups = shards[starts], groups[starts]
        prompts = folder.index(["prompt_id"])["prompt_id"] if by_prompt or 0 < eval_split < 1 else None
        if prompts is None or eval_split in (0, 1):
            self._held_out = np.full(len(index), eval_split == 1)
        else:
            self._held_out = _below(prompts, eval_split)
        # A number for each pair's prompt.
        self._prompts: Positions | None = None
        if by_prompt and prompts is not None:
            self._prompts = numbers(prompts.combine_chunks().dictionary_encode().indices)
        self.eval_positions: Positions = np.flatnonzero(self._held_out).astype(np.int32)
        self.train_size = len(index) - len(self.eval_positions)
        self._rows = numbers(index["row"])
        self._weights = self._normalised_weights(folder.column(WEIGHT, rows=self._rows, default=1.0))
        self._margins = self._all_margins() if margins else None
        # The first thread to open a shard checks its hash, or fetches it; the others wait.
        self._opening = [threading.Lock() for _ in folder.manifest.shards]

    def epoch(self, *, seed: int, epoch: int) -> Positions:
        """The training pairs of one epoch, as positions in the index, in order."""
        rng = np.random.default_rng([seed, epoch])
        blocks = rng.permutation(len(self._shards))
        order = np.empty(self.train_size, dtype=np.int32)
        filled = 0
        for i in range(0, len(blocks), WINDOW_GROUPS):
            ranges = [
                np.arange(*self._bounds[b : b + 2], dtype=np.int32) for b in blocks[i : i + WINDOW_GROUPS]
            ]
            window = np.concatenate(ranges)
            shuffled = self._shuffled(rng, window[~self._held_out[window]])
            order[filled : filled + len(shuffled)] = shuffled
            filled += len(shuffled)
        return order

    def steps(self, *, seed: int, size: int, consumed: int = 0) -> Generator[list[ScoredPair]]:
        """The pairs of each optimizer step, epoch after epoch without end.

        Threads read row groups ahead; close the iterator to end them (``contextlib.closing``).

        Args:
            seed: Decides the order.
            size: Pairs per step; the last step of an epoch may have fewer. Where prompts are drawn, other
                steps may too.
            consumed: Number of pairs that earlier steps used: the state of the data order. Their row groups
                are not read again, except those that later pairs need too.

        Raises:
            DataError: A shard is damaged; at the first step that needs it.
        """
        epoch, skip = divmod(consumed, self.train_size)
        for number in itertools.count(epoch):
            order = self.epoch(seed=seed, epoch=number)[skip:]
            yield from self._read_batches(order, self._step_ends(order, size))
            skip = 0

    def count_steps(self, *, seed: int, size: int, epochs: int) -> int:
        """Number of steps of these epochs."""
        if self._prompts is None:
            return epochs * math.ceil(self.train_size / size)
        orders = (self.epoch(seed=seed, epoch=number) for number in range(epochs))
        return sum(len(self._step_ends(order, size)) for order in orders)

    def batches(self, positions: Positions, size: int) -> Generator[list[ScoredPair]]:
        """Consecutive batches of ``size`` pairs; the last may be smaller. See ``steps``.

        Raises:
            DataError: A shard is damaged; at the first batch that needs it.
        """
        return self._read_batches(positions, _every(size, len(positions)))

    def _read_batches(self, positions: Positions, ends: Sequence[int]) -> Generator[list[ScoredPair]]:
        """The pairs at these positions, in batches that end at these places of them.

        A thread reads each row group once, ahead of its first pair, and it is held until its last pair. If
        ``positions`` come from ``epoch`` or ascend, at most two windows of row groups are held.

        Raises:
            DataError: A shard is damaged; at the first batch that needs it.
        """
        blocks = (np.searchsorted(self._bounds, positions, side="right") - 1).astype(np.int32)
        _, first = np.unique(blocks, return_index=True)
        needed = blocks[np.sort(first)].tolist()
        left = np.bincount(blocks, minlength=len(self._shards))
        held: dict[int, list[ScoredPair]] = {}
        with contextlib.closing(read_ahead(self._read, needed, ahead=_AHEAD_GROUPS)) as coming:
            for begin, end in itertools.pairwise([0, *ends]):
                batch = []
                part = slice(begin, end)
                for position, block in zip(positions[part].tolist(), blocks[part].tolist(), strict=True):
                    if block not in held:
                        held[block] = next(coming)
                    batch.append(held[block][position - int(self._bounds[block])])
                    left[block] -= 1
                    if not left[block]:
                        del held[block]
                yield batch

    def fetch(self, positions: Sequence[int] | Positions) -> list[ScoredPair]:
        """The pairs at these positions, in order."""
        wanted = np.asarray(positions, dtype=np.int32)
        return list(itertools.chain.from_iterable(self.batches(wanted, size=WINDOW_GROUPS)))

    @property
    def weighted(self) -> bool:
        """Whether the data says how much each pair counts."""
        return self._weights is not None

    def weights(self, pairs: Sequence[ScoredPair]) -> list[float] | None:
        """How much each pair counts in the loss, 1 on average over the training pairs; None: all alike."""
        return self._of_pairs(self._weights, pairs)

    def margins(self, pairs: Sequence[ScoredPair]) -> list[float] | None:
        """How much better each pair's chosen is, as the data says; None where no loss reads it."""
        return self._of_pairs(self._margins, pairs)

    def _of_pairs(self, values: Values | None, pairs: Sequence[ScoredPair]) -> list[float] | None:
        if values is None:
            return None
        places = np.searchsorted(self._rows, [pair.row for pair in pairs])
        return [float(value) for value in values[places]]

    def _shuffled(self, rng: np.random.Generator, window: Positions) -> Positions:
        """A window's pairs in a random order; the pairs of a prompt stay together if prompts are drawn."""
        if self._prompts is None:
            return rng.permutation(window)
        _, number = np.unique(self._prompts[window], return_inverse=True)
        place = rng.permutation(number.max(initial=-1) + 1)
        found: Positions = window[np.argsort(place[number], kind="stable")]
        return found

    def _step_ends(self, order: Positions, size: int) -> list[int]:
        """Where each step's pairs end. Steps from any of these places on are the same."""
        if self._prompts is None:
            return _every(size, len(order))
        prompts = self._prompts[order]
        ends: list[int] = []
        begin = 0
        # Where a prompt's pairs end.
        for end in [*(np.flatnonzero(np.diff(prompts)) + 1).tolist(), len(order)]:
            last = ends[-1] if ends else 0
            if end - last > size and begin > last:
                ends.append(begin)
                last = begin
            ends += range(last + size, end, size)
            begin = end
        return [*ends, len(order)] if len(order) else []

    @property
    def values_sha256(self) -> str:
        """Hash of the pairs' weights, and of their margins if they are read."""
        digest = hashlib.sha256()
        for values in (self._weights, self._margins):
            digest.update(b"" if values is None else values.astype("<f8").tobytes())
            digest.update(b";")
        return digest.hexdigest()

    def _all_margins(self) -> Values:
        path = self._folder.path
        margins = self._folder.column(MARGIN, rows=self._rows, default=np.nan)
        missing = self._rows if margins is None else self._rows[np.isnan(margins)]
        if margins is None or len(missing):
            others = f" ({len(missing)} rows in all)" if len(missing) > 1 else ""
            raise ConfigError(
                "the loss reads margins, and "
                + ("the data has none" if margins is None else f"row {missing[0]} has none{others}"),
                where=str(path),
                why="it says how much better chosen is; any number in its place would be made up",
                fix=f"write {quoted(path / own_file(MARGIN))} with the columns row and margin, of all rows, "
                "or train with --loss-type sigmoid",
            )
        return margins

    def _normalised_weights(self, weights: Values | None) -> Values | None:
        """Weights divided by their mean, so that their scale does not act on the learning rate."""
        if weights is None:
            return None
        with np.errstate(over="ignore"):
            mean = weights[~self._held_out].mean() if self.train_size else 1.0
        if not 0 < mean < np.inf:
            noun = self._folder.manifest.fingerprint.noun
            raise DataError(
                f"the weights of all training {noun}s are 0"
                if mean == 0
                else f"the weights of the training {noun}s add up to infinity",
                where=str(column_path(self._folder.path, WEIGHT, self._folder.manifest.columns)),
                why=f"the policy would learn nothing: each {noun} would count as 0",
                fix="write weights above 0 to columns/weight.parquet there (columns row and weight)",
            )
        return weights / mean

    def _read(self, block: int) -> list[ScoredPair]:
        shard = int(self._shards[block])
        with self._opening[shard]:
            (pairs,) = self._folder.row_groups(shard, row_groups=[int(self._groups[block])])
        return pairs


def _every(size: int, count: int) -> list[int]:
    """Ends of batches of ``size``."""
    return [*range(size, count, size), count] if count else []


def share_that_holds_out(prompt_ids: pa.ChunkedArray) -> float | None:
    """A share that holds out some prompts and not all: 0.05, or the smallest in as few decimals as will do.

    Args:
        prompt_ids: Of every pair.

    Returns:
        None where no share of four decimals does.
    """
    places = _places(prompt_ids)
    lowest, highest = float(places.min(initial=1.0)), float(places.max(initial=0.0))
    least = [math.floor(lowest * 10**decimals + 1) / 10**decimals for decimals in (2, 3, 4)]
    return next((share for share in (0.05, *least) if lowest < share <= highest), None)


def _below(prompt_ids: pa.ChunkedArray, share: float) -> npt.NDArray[np.bool_]:
    """Whether each identifier's place is below a share."""
    return _places(prompt_ids) < share


def _places(prompt_ids: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """The first 32 bits of each identifier, read as a number from 0 to 1."""
    digits = pc.utf8_slice_codeunits(prompt_ids, 0, 8).combine_chunks().cast(pa.binary()).cast(pa.binary(8))
    # Eight characters are viewed as one int64, so that numpy needs no object per row.
    text = numbers(digits.view(pa.int64())).tobytes().decode("ascii")
    return np.frombuffer(bytes.fromhex(text), dtype=">u4") / 2**32
