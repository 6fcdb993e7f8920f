import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fakes import ScriptedScorer

from dpo_opt.optimize.stream import WINDOW_GROUPS, PairStream
from dpo_opt.precompute import PrecomputeConfig, precompute
from dpo_opt.schemas.manifest import ShardFolder
from dpo_opt.schemas.pairs import ScoredPair

PAIRS, PROMPTS, PER_SHARD = 420, 200, 10


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardFolder:
    """42 shards of one row group each: more blocks than are shuffled together. Prompts recur far apart."""
    made = tmp_path_factory.mktemp("stream")
    rows = [
        {"prompt": f"prompt {i % PROMPTS}:", "chosen": f" yes {i}", "rejected": f" no {i}"}
        for i in range(PAIRS)
    ]
    (made / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PrecomputeConfig(
        model=str(tiny_model),
        data=made / "pairs.jsonl",
        shards=made / "shards",
        dtype="float32",
        pairs_per_shard=PER_SHARD,
    )
    precompute(config, scorer=ScriptedScorer())
    opened = ShardFolder.open(config.shards)
    assert len(opened.manifest.shards) == 42 > 2 * WINDOW_GROUPS
    return opened


class CountingFolder(ShardFolder):
    """Remembers which row groups were read."""

    def __init__(self, folder: ShardFolder) -> None:
        super().__init__(folder.path, folder.manifest)
        self.reads: list[tuple[int, int]] = []

    def row_groups(self, shard: int, *, row_groups: object = None) -> Iterator[list[ScoredPair]]:
        assert isinstance(row_groups, list)
        self.reads += [(shard, group) for group in row_groups]
        return super().row_groups(shard, row_groups=row_groups)


def test_every_training_pair_comes_exactly_once_per_epoch(folder: ShardFolder) -> None:
    stream = PairStream(folder, eval_split=0.2)
    for epoch in range(3):
        order = stream.epoch(seed=1, epoch=epoch)
        assert sorted([*order.tolist(), *stream.eval_positions.tolist()]) == list(range(PAIRS))
        assert len(order) == stream.train_size


def test_the_order_is_a_function_of_seed_and_epoch_alone(folder: ShardFolder) -> None:
    stream, other = PairStream(folder, eval_split=0.1), PairStream(folder, eval_split=0.1)
    other.epoch(seed=9, epoch=0)
    other.fetch([3, 400, 77])
    orders = {}
    for seed in (1, 2):
        for epoch in (0, 1):
            order = stream.epoch(seed=seed, epoch=epoch).tolist()
            assert other.epoch(seed=seed, epoch=epoch).tolist() == order
            orders[seed, epoch] = tuple(order)
    assert len(set(orders.values())) == 4
    assert all(list(order) != sorted(order) for order in orders.values())


def test_pairs_are_shuffled_across_row_groups(folder: ShardFolder) -> None:
    stream = PairStream(folder, eval_split=0.0)
    blocks = stream.epoch(seed=0, epoch=0) // PER_SHARD
    distinct = [len(set(blocks[i : i + 16].tolist())) for i in range(0, 320, 16)]
    # 16 of 160 pairs drawn from 16 row groups hold 10 different ones on average.
    assert np.mean(distinct) > 8


def test_no_prompt_stands_on_both_sides(folder: ShardFolder) -> None:
    stream = PairStream(folder, eval_split=0.3)
    train = {p.prompt_id for p in stream.fetch(stream.epoch(seed=0, epoch=0))}
    held_out = {p.prompt_id for p in stream.fetch(stream.eval_positions)}
    assert len(train) + len(held_out) == PROMPTS
    assert not train & held_out
    # 200 draws with p = 0.3: sd 6.5.
    assert 40 <= len(held_out) <= 80


def test_a_larger_share_only_adds_prompts(folder: ShardFolder) -> None:
    small, large = (set(PairStream(folder, eval_split=share).eval_positions.tolist()) for share in (0.1, 0.4))
    assert small
    assert small < large


def test_nothing_is_held_out_by_default(folder: ShardFolder) -> None:
    stream = PairStream(folder, eval_split=0.0)
    assert stream.train_size == PAIRS
    assert stream.eval_positions.tolist() == []


def test_fetch_gives_what_is_on_disk(folder: ShardFolder) -> None:
    direct = list(folder.pairs())
    positions = np.random.default_rng(0).permutation(PAIRS)
    for position, pair in zip(positions, PairStream(folder, eval_split=0.0).fetch(positions), strict=True):
        expected = direct[position]
        assert pair.row == expected.row
        assert pair.pair_id == expected.pair_id
        np.testing.assert_array_equal(pair.ref_chosen_token_logps, expected.ref_chosen_token_logps)
        np.testing.assert_array_equal(pair.ref_rejected_token_logps, expected.ref_rejected_token_logps)


@pytest.mark.parametrize("size", [7, 64])
def test_an_epoch_reads_each_row_group_once(folder: ShardFolder, size: int) -> None:
    counting = CountingFolder(folder)
    stream = PairStream(counting, eval_split=0.0)
    seen = [p.row for pairs in stream.batches(stream.epoch(seed=3, epoch=0), size) for p in pairs]
    assert sorted(seen) == list(range(PAIRS))
    assert sorted(counting.reads) == [(shard, 0) for shard in range(42)]


def test_memory_holds_one_window(folder: ShardFolder) -> None:
    stream = PairStream(folder, eval_split=0.0)
    largest = 0
    for position in np.random.default_rng(0).permutation(PAIRS):
        stream.fetch([position])
        largest = max(largest, len(stream._cache))
    assert largest == WINDOW_GROUPS + 1


def test_batches_are_consecutive_and_the_last_may_be_smaller(folder: ShardFolder) -> None:
    stream = PairStream(folder, eval_split=0.0)
    order = stream.epoch(seed=0, epoch=0)[:23]
    batches = [[p.row for p in pairs] for pairs in stream.batches(order, 8)]
    assert [len(b) for b in batches] == [8, 8, 7]
    assert [row for b in batches for row in b] == order.tolist()
