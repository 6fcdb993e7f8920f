"""What the first pairs show that is likely to be wrong with all, said before a reference scores them."""

import contextlib
import itertools
from collections import Counter
from pathlib import Path

from dpo_opt.precompute.check.problems import FOUND
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.read.datasets import scan_pairs
from dpo_opt.precompute.tokens.ends import Ends
from dpo_opt.precompute.tokens.tokenize import PairTokenizer
from dpo_opt.schemas.counts import counted
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import PreferencePair

_PAIRS = 16


def odd_ends(config: PrecomputeConfig, tokenizer: PairTokenizer, folder: Path) -> list[str]:
    """One line for each way in which the first pairs end oddly; none where they cannot be read now.

    Args:
        config: Says where the pairs are.
        tokenizer: The reference's.
        folder: Of the reference.

    Raises:
        ConfigError: As ``PairTokenizer.encode``.
    """
    pairs: list[PreferencePair] = []
    with contextlib.suppress(DataError):  # which is said where it matters: when they are scored
        pairs += itertools.islice((r for r in scan_pairs(config) if isinstance(r, PreferencePair)), _PAIRS)
    ends = Ends(tokenizer.tokenizer, folder, added=tokenizer.added)
    found: Counter[str] = Counter()
    for pair, ids in zip(pairs, tokenizer.encode(pairs), strict=True):
        if not isinstance(ids, DataError):
            found.update(ends.odd(ids, plain=isinstance(pair.prompt, str)))
    noun = "row" if pairs and pairs[0].label is not None else "pair"
    return [
        f"{FOUND[kind].title} (in {count} of the first {counted(len(pairs), noun)}): {FOUND[kind].why}; "
        f"{FOUND[kind].fix}"
        for kind, count in sorted(found.items())
    ]
