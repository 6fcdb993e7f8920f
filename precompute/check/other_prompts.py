"""Which unpaired rows get no completion of another prompt, from what an audit keeps of them.

``precompute`` gives them one within their shard (``tokens/mismatched.py``). So it counts where a row stands,
and which prompts are the same once ``keep_end`` has cut them.
"""

import hashlib
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dpo_opt.precompute.tokens.mismatched import first_fitting
from dpo_opt.precompute.tokens.truncation import PairIds
from dpo_opt.schemas.pairs import PreferencePair

Mask = npt.NDArray[np.bool_]


class OtherPrompts(NamedTuple):
    """What decides it for U unpaired rows among P."""

    rows: npt.NDArray[np.intp]
    """(U,) which of the P they are."""
    shards: npt.NDArray[np.int64]
    """(U,) the shard of each; ascending."""
    prompts: npt.NDArray[np.uint64]
    """(U, 1 + lengths): ``prompt_hashes``."""
    lengths: tuple[int, ...]

    def without(self, tokens: npt.NDArray[np.int32], kept: Mask, *, max_length: int) -> Mask:
        """(P,) the rows that are left out for it among those that are kept otherwise.

        Args:
            tokens: (P, 5) as in ``kept_pairs``.
            kept: (P,).
            max_length: Most tokens of prompt plus completion.
        """
        found = np.zeros(len(kept), dtype=bool)
        here = np.flatnonzero(kept[self.rows])
        rows, shards = self.rows[here], self.shards[here]
        column = 1 + self.lengths.index(max_length) if max_length in self.lengths else 0
        prompts = self.prompts[here, column]
        length, completion, uncounted = tokens[rows, 0], tokens[rows, 1], tokens[rows, 4]
        if column:
            length = np.minimum(length, max_length - completion)
        room = max_length - length
        starts = np.flatnonzero(np.diff(shards, prepend=-1))
        for start, stop in itertools.pairwise([*starts.tolist(), len(rows)]):
            part = slice(start, stop)
            if (prompts[part] == prompts[start]).all():
                found[rows[part]] = True
            elif uncounted[part].max() >= room[part].min():
                found[rows[part]] = _without(prompts[part], uncounted[part], room[part])
        return found


def prompt_hashes(
    pairs: Sequence[PreferencePair], ids: Sequence[PairIds], lengths: Sequence[int]
) -> npt.NDArray[np.uint64]:
    """(U, 1 + lengths) hashes of the unpaired rows' prompt tokens: of all, then as ``keep_end`` cuts them."""
    unpaired = [found for pair, found in zip(pairs, ids, strict=False) if pair.label is not None]
    rows = [
        [_hash(found, None), *(_hash(found, max_length - len(found.chosen)) for max_length in lengths)]
        for found in unpaired
    ]
    return np.array(rows, dtype=np.uint64).reshape(len(unpaired), 1 + len(lengths))


def _without(
    prompts: npt.NDArray[np.uint64], uncounted: npt.NDArray[np.int32], room: npt.NDArray[np.int32]
) -> list[bool]:
    """Which rows of a shard get none, where of some completions nothing counts in the room of some rows."""

    def fitting(row: int, other: int) -> int | None:
        return other if uncounted[other] < room[row] else None

    return [given is None for given in first_fitting(prompts.tolist(), fitting)]


def _hash(ids: PairIds, room: int | None) -> int:
    """Of the last tokens of a prompt for which there is room; None: of all."""
    kept = ids.prompt if room is None else ids.prompt[max(len(ids.prompt) - room, 0) :]
    return int.from_bytes(hashlib.blake2b(kept.tobytes(), digest_size=8).digest(), "little")
