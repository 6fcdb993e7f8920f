"""Pairs that nearly repeat one another, by MinHash (Broder 1997) and locality-sensitive hashing."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.pairs import PreferencePair, Text

PERMUTATIONS = 128
_BANDS = 16
_SHINGLE = 3  # words


def signatures(pairs: Sequence[PreferencePair], *, rows: int) -> npt.NDArray[np.uint32]:
    """(rows, PERMUTATIONS) signatures of the pairs; (rows, 0) where there are no pairs to sign.

    Raises:
        ConfigError: rensa is not installed.
    """
    if not pairs:
        return np.zeros((rows, 0), dtype=np.uint32)
    rensa = _rensa()
    sets = [_shingles(pair) for pair in pairs]
    digests = rensa.RMinHash.digests_from_token_sets(sets, PERMUTATIONS, 1)
    return np.array(digests, dtype=np.uint32)


def nearest_earlier(signed: npt.NDArray[np.uint32], *, similarity: float) -> dict[int, int]:
    """Pair to an earlier pair that it nearly repeats, where the estimated Jaccard similarity is reached.

    Args:
        signed: (P, PERMUTATIONS) signatures.
        similarity: From 0 to 1.
    """
    rows_per_band = PERMUTATIONS // _BANDS
    found: dict[int, int] = {}
    # Band by band, so that one band's buckets are in memory at a time.
    for band in range(_BANDS):
        keys = np.ascontiguousarray(signed[:, band * rows_per_band : (band + 1) * rows_per_band])
        packed = keys.view(np.dtype((np.void, keys.dtype.itemsize * rows_per_band))).ravel()
        order = np.argsort(packed, kind="stable")
        starts = np.flatnonzero(np.r_[True, packed[order][1:] != packed[order][:-1]])
        for bucket in np.split(order, starts[1:]):
            if len(bucket) > 1:
                _compare(signed, bucket, similarity, found)
    return found


def _compare(
    signed: npt.NDArray[np.uint32], bucket: npt.NDArray[np.intp], similarity: float, found: dict[int, int]
) -> None:
    # Against the bucket's first only: a thousand copies are a thousand comparisons, not a million.
    first = int(bucket[0])
    alike = (signed[bucket[1:]] == signed[first]).mean(axis=1)
    for pair in bucket[1:][alike >= similarity]:
        found.setdefault(int(pair), first)


def _shingles(pair: PreferencePair) -> list[str]:
    """Runs of words of prompt, chosen and rejected, each marked with its part; of unpaired rows also with the
    label, so that no two of different labels are alike."""
    shingles = []
    label = "" if pair.label is None else "-+"[pair.label]
    marks = [part + label for part in "pcr"]
    for mark, text in zip(marks, (pair.prompt, pair.chosen, pair.rejected), strict=True):
        words = _flat(text).lower().split()
        runs = max(1, len(words) - _SHINGLE + 1)
        shingles += [mark + " ".join(words[i : i + _SHINGLE]) for i in range(runs)]
    return shingles


def _flat(text: Text) -> str:
    return text if isinstance(text, str) else " ".join(str(message["content"]) for message in text)


def _rensa() -> Any:
    try:
        import rensa
    except ImportError as error:
        raise ConfigError(
            "--near-duplicates needs rensa, which is not installed", fix="pip install 'dpo-opt[dedup]'"
        ) from error
    return rensa
