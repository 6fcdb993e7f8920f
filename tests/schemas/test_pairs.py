import hashlib
import itertools
import struct

import numpy as np
import pytest

from dpo_opt.schemas.pairs import ScoredPair, TokenizedPair, TokenSequence, content_hash


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def by_hand(*parts: list[int]) -> str:
    """FORMAT.md, "Identifiers", with struct instead of numpy."""
    message = b"".join(struct.pack("<I", len(p)) + b"".join(struct.pack("<i", i) for i in p) for p in parts)
    return hashlib.sha256(message).hexdigest()[:32]


@pytest.mark.parametrize("parts", [[[]], [[5]], [[1, 2, 3], [4], [70_000, 2**31 - 1]], [[1], [], [2]]])
def test_content_hash_is_the_documented_formula(parts: list[list[int]]) -> None:
    assert content_hash(*(ids(*p) for p in parts)) == by_hand(*parts)


def test_content_hash_has_a_known_value() -> None:
    # printf '\x01\0\0\0\x07\0\0\0' | sha256sum
    assert content_hash(ids(7)) == "f0e6dfdca14da812bd3febae22fe83f4"


def test_moving_a_token_over_a_boundary_changes_the_hash() -> None:
    tokens = [1, 2, 3, 4]
    hashes = {
        content_hash(ids(*tokens[:a]), ids(*tokens[a:b]), ids(*tokens[b:]))
        for a, b in itertools.combinations_with_replacement(range(5), 2)
    }
    assert len(hashes) == 15


def test_content_hash_sees_values_not_memory_layout() -> None:
    wide = np.arange(12, dtype=np.int64)
    assert content_hash(wide[::2]) == content_hash(ids(0, 2, 4, 6, 8, 10))
    assert content_hash(wide[::2].astype(">i4")) == content_hash(ids(0, 2, 4, 6, 8, 10))


def test_identifiers_depend_on_what_they_name_and_on_nothing_else() -> None:
    pair = TokenizedPair(row=1, source="a", prompt_ids=ids(1), chosen_ids=ids(2), rejected_ids=ids(3))
    elsewhere = TokenizedPair(
        row=9,
        source=None,
        prompt_ids=ids(1),
        chosen_ids=ids(2),
        rejected_ids=ids(3),
        chosen_truncated=True,
    )
    swapped = TokenizedPair(row=1, source="a", prompt_ids=ids(1), chosen_ids=ids(3), rejected_ids=ids(2))
    assert pair.pair_id == elsewhere.pair_id == by_hand([1], [2], [3])
    assert pair.pair_id != swapped.pair_id
    assert pair.prompt_id == swapped.prompt_id == by_hand([1])


def test_equal_sequences_have_equal_keys_and_a_moved_boundary_another() -> None:
    assert TokenSequence(ids(1, 2), ids(3)).key == TokenSequence(ids(1, 2), ids(3)).key
    assert TokenSequence(ids(1, 2), ids(3)).key != TokenSequence(ids(1), ids(2, 3)).key


def test_sums_are_accumulated_in_float64() -> None:
    # In float32 the small ones would vanish beside the large one.
    logps = np.array([-1e6] + [-1e-3] * 1000, dtype=np.float32)
    pair = ScoredPair(
        row=0,
        source=None,
        prompt_ids=ids(1),
        chosen_ids=np.zeros(1001, np.int32),
        rejected_ids=ids(1),
        ref_chosen_token_logps=logps,
        ref_rejected_token_logps=ids(-1).astype(np.float32),
    )
    assert pair.ref_chosen_logps == pytest.approx(-1e6 - 1.0, abs=1e-6)
    assert float(np.add.accumulate(logps)[-1]) != pytest.approx(-1e6 - 1.0, abs=1e-6)
