from collections.abc import Sequence

import numpy as np
import pytest
import torch

from dpo_opt.optimize.forward.packing import (
    Group,
    Segment,
    VarlenIndex,
    pack,
    packed_size,
    pad,
    pair_group,
    plan_bins,
    plan_padded_bins,
    shared_lengths,
    varlen_index,
)
from dpo_opt.schemas.pairs import TokenizedPair, TokenSequence


def group(prompt: Sequence[int], *completions: Sequence[int]) -> Group:
    return tuple(
        TokenSequence(np.array(prompt, dtype=np.int32), np.array(c, dtype=np.int32)) for c in completions
    )


def random_groups(count: int, *, seed: int = 0) -> list[Group]:
    rng = np.random.default_rng(seed)
    groups = []
    for _ in range(count):
        prompt = rng.integers(2, 9, size=rng.integers(1, 6)).tolist()
        # Few different ids, so that completions often begin alike.
        completions = [
            rng.integers(2, 4, size=rng.integers(1, 7)).tolist() for _ in range(rng.integers(1, 5))
        ]
        found = group(prompt, *completions)
        for _ in range(rng.integers(0, 3)):
            # Another turn of the conversation, or another one that begins alike.
            kept = prompt[: rng.integers(0, len(prompt) + 1)] + rng.integers(2, 4, size=2).tolist()
            found += group(kept, completions[0])
        groups.append(found)
    return groups


@pytest.mark.parametrize(
    ("completions", "expected"),
    [
        pytest.param(([5, 6], [7, 8]), [3], id="they part at once"),
        pytest.param(([5, 6, 7], [5, 6, 8]), [5], id="they share two tokens"),
        pytest.param(([5, 6], [5, 6, 7]), [4], id="one begins with the other"),
        pytest.param(([5], [6]), [3], id="one token each"),
        pytest.param(([5], [5, 6]), [3], id="one token that begins the other"),
        pytest.param(([5, 6],), [], id="alone"),
        pytest.param(([5, 6, 7], [5, 6, 8], [5, 9], [5, 6, 7, 7]), [5, 4, 5], id="four completions"),
        pytest.param(([5, 6], [5, 6]), [4], id="equal"),
    ],
)
def test_a_sequence_shares_what_it_has_in_common_with_the_first_but_its_last_token(
    completions: tuple[list[int], ...], expected: list[int]
) -> None:
    assert shared_lengths(group([1, 2, 3], *completions)) == [0, *expected]


def test_other_prompts_share_what_they_have_in_common() -> None:
    first, *others = (
        group(prompt, [5, 6, 7])[0] for prompt in ([1, 2, 3, 4], [1, 2], [1, 2, 3, 4, 5], [9], [1])
    )
    assert shared_lengths((first, *others)) == [0, 2, 5, 0, 1]


def test_a_pair_is_laid_out_as_worked_by_hand() -> None:
    batch = pack([group([1, 2], [5, 6, 7], [5, 8])])
    # [1 2 5] is common; chosen goes on with 6 (its 7 predicts nothing), rejected has nothing left to feed.
    assert batch.input_ids.tolist() == [[1, 2, 5, 6]]
    assert batch.model_kwargs["position_ids"].tolist() == [[0, 1, 2, 3]]
    assert batch.model_kwargs["segments"] == (Segment(0, 4, 0, 0),)
    assert batch.targets.tolist() == [5, 6, 7, 5, 8]
    assert batch.scored_rows.tolist() == [1, 2, 3, 1, 2]
    assert batch.lengths == [3, 2]


def test_positions_restart_after_the_prefix_and_segments_name_it() -> None:
    batch = pack([group([1], [2, 3]), group([1, 2, 3], [5, 6, 7], [8, 9, 4], [8])])
    assert batch.input_ids.tolist() == [[1, 2, 1, 2, 3, 5, 6, 8, 9]]
    assert batch.model_kwargs["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3, 4, 3, 4]]
    assert batch.model_kwargs["segments"] == (
        Segment(0, 2, 0, 0),
        Segment(2, 7, 2, 2),
        Segment(7, 9, 2, 5),
        # [8] has one token, which the prefix predicts: it feeds no row of its own.
    )
    assert batch.targets.tolist() == [2, 3, 5, 6, 7, 8, 9, 4, 8]
    assert batch.scored_rows.tolist() == [0, 1, 4, 5, 6, 4, 7, 8, 4]
    assert batch.lengths == [2, 3, 3, 1]


def test_every_scored_row_has_seen_exactly_the_tokens_before_its_target() -> None:
    groups = random_groups(60)
    batch = pack(groups)
    ids = batch.input_ids[0].tolist()
    positions = batch.model_kwargs["position_ids"][0].tolist()
    segments = batch.model_kwargs["segments"]
    shared_somewhere = 0
    scored = iter(zip(batch.scored_rows.tolist(), batch.targets.tolist(), strict=True))
    for sequence in (s for g in groups for s in g):
        joined = [*sequence.prompt_ids.tolist(), *sequence.completion_ids.tolist()]
        for position in range(len(sequence.prompt_ids), len(joined)):
            row, target = next(scored)
            (segment,) = [s for s in segments if s.start <= row < s.stop]
            seen = [*range(segment.prefix_start, segment.prefix_stop), *range(segment.start, row + 1)]
            assert [ids[i] for i in seen] == joined[:position]
            assert [positions[i] for i in seen] == list(range(position))
            assert target == joined[position]
            shared_somewhere += segment.prefix_stop > segment.prefix_start
    assert next(scored, None) is None
    assert shared_somewhere > 50


def test_packed_size_is_the_number_of_rows() -> None:
    groups = random_groups(40, seed=1)
    assert [packed_size(g) for g in groups] == [pack([g]).input_ids.shape[1] for g in groups]
    assert pack(groups).input_ids.shape[1] == sum(map(packed_size, groups))


def test_segments_cover_all_rows_in_order() -> None:
    batch = pack(random_groups(40, seed=2))
    segments = batch.model_kwargs["segments"]
    assert [s.start for s in segments] == [0, *(s.stop for s in segments[:-1])]
    assert segments[-1].stop == batch.input_ids.shape[1]


def test_a_prefix_is_a_key_of_every_segment_that_names_it() -> None:
    index = varlen_index(
        [Segment(0, 2, 0, 0), Segment(2, 7, 2, 2), Segment(7, 9, 2, 5), Segment(9, 10, 2, 5)]
    )
    assert index.key_rows is not None
    assert index.key_rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 2, 3, 4, 7, 8, 2, 3, 4, 9]
    assert index.query_starts.tolist() == [0, 2, 7, 9, 10]
    assert index.key_starts.tolist() == [0, 2, 7, 12, 16]
    assert (index.longest_query, index.longest_key) == (5, 5)
    assert index.query_starts.dtype == index.key_starts.dtype == torch.int32


def test_where_nothing_is_shared_no_key_is_gathered() -> None:
    index = varlen_index([Segment(0, 2, 0, 0), Segment(2, 3, 2, 2)])
    assert index.key_rows is None
    assert index.query_starts.tolist() == index.key_starts.tolist() == [0, 2, 3]


def test_the_longest_key_counts_the_prefix() -> None:
    index = varlen_index([Segment(0, 4, 0, 0), Segment(4, 7, 0, 2)])
    assert (index.longest_query, index.longest_key) == (4, 5)


def test_a_packed_batch_indexes_its_own_segments() -> None:
    batch = pack(random_groups(20, seed=4))
    found, expected = batch.model_kwargs["varlen"], varlen_index(batch.model_kwargs["segments"])
    assert isinstance(found, VarlenIndex)
    assert found.key_rows.tolist() == expected.key_rows.tolist()
    assert found.key_starts.tolist() == expected.key_starts.tolist()
    assert found.query_starts[-1] == batch.input_ids.shape[1]


def test_a_padded_batch_is_laid_out_as_worked_by_hand() -> None:
    batch = pad([group([1, 2], [5, 6, 7], [8])])
    assert batch.input_ids.tolist() == [[1, 2, 5, 6], [1, 2, 0, 0]]
    assert batch.model_kwargs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.targets.tolist() == [5, 6, 7, 8]
    assert batch.scored_rows.tolist() == [1, 2, 3, 5]
    assert batch.lengths == [3, 1]


def test_a_pair_is_two_sequences_chosen_first() -> None:
    ids = {name: np.array([n], dtype=np.int32) for n, name in enumerate(("prompt", "chosen", "rejected"))}
    pair = TokenizedPair(
        row=0,
        source=None,
        prompt_ids=ids["prompt"],
        chosen_ids=ids["chosen"],
        rejected_ids=ids["rejected"],
    )
    assert [(s.prompt_ids.tolist(), s.completion_ids.tolist()) for s in pair_group(pair)] == [
        ([0], [1]),
        ([0], [2]),
    ]


def test_first_fit_takes_the_longest_first() -> None:
    assert plan_bins([3, 7, 5, 2, 4], 10) == [[1, 0], [2, 4], [3]]


def test_bins_hold_every_index_once_and_stay_within_the_budget() -> None:
    sizes = np.random.default_rng(0).integers(1, 130, size=200).tolist()
    bins = plan_bins(sizes, 100)
    assert sorted(i for b in bins for i in b) == list(range(200))
    too_large = [b for b in bins if sum(sizes[i] for i in b) > 100]
    assert too_large
    assert all(len(b) == 1 for b in too_large)
    assert plan_bins(sizes, 100) == bins
    assert sum(sizes) / (100 * len(bins)) > 0.9


def test_padded_bins_count_the_padding() -> None:
    groups = random_groups(100, seed=3)
    bins = plan_padded_bins(groups, 30)
    assert sorted(i for b in bins for i in b) == list(range(100))
    cells = [pad([groups[i] for i in b]).input_ids.numel() for b in bins]
    assert all(count <= 30 or len(b) == 1 for count, b in zip(cells, bins, strict=True))
    assert max(map(len, bins)) > 1


def test_no_bins_for_nothing() -> None:
    assert plan_bins([], 10) == []
    assert plan_padded_bins([], 10) == []


def test_moving_a_batch_keeps_what_is_no_tensor() -> None:
    batch = pack(random_groups(3))
    moved = batch.to(torch.device("meta"))
    assert moved.input_ids.device.type == moved.scored_rows.device.type == moved.targets.device.type == "meta"
    assert moved.model_kwargs["position_ids"].device.type == "meta"
    assert moved.model_kwargs["segments"] == batch.model_kwargs["segments"]
    index, before = moved.model_kwargs["varlen"], batch.model_kwargs["varlen"]
    assert {t.device.type for t in (index.key_rows, index.query_starts, index.key_starts)} == {"meta"}
    assert (index.longest_query, index.longest_key) == (before.longest_query, before.longest_key)
    assert batch.input_ids.device.type == before.key_rows.device.type == "cpu"
    assert moved.lengths == batch.lengths
