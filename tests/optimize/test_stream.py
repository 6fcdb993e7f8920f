import contextlib
import itertools
import json
import shutil
import threading
import time
import weakref
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fakes import ScriptedScorer

from dpo_opt.optimize.stream import WINDOW_GROUPS, PairStream
from dpo_opt.precompute import PrecomputeConfig, precompute
from dpo_opt.schemas import shard_folder
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.locations import location
from dpo_opt.schemas.pairs import ScoredPair
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.sidecars import WEIGHT, Column, planned_file, write_column

PAIRS, PROMPTS, PER_SHARD = 420, 200, 10


Row = dict[str, str]


def score(model: Path, made: Path, rows: list[Row], *, per_shard: int) -> ShardFolder:
    (made / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PrecomputeConfig(
        model=str(model),
        data=made / "pairs.jsonl",
        shards=made / "shards",
        dtype="float32",
        pairs_per_shard=per_shard,
    )
    precompute(config, scorer=ScriptedScorer())
    return ShardFolder.open(config.shards)


def recurring(pairs: int, *, word: str) -> list[Row]:
    """Each prompt comes again after all others."""
    return [
        {"prompt": f"prompt {i % PROMPTS}:", "chosen": f" yes {i}", "rejected": f" {word} {i}"}
        for i in range(pairs)
    ]


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardFolder:
    """42 shards of one row group each: more blocks than are shuffled together. Prompts recur far apart."""
    made = tmp_path_factory.mktemp("stream")
    opened = score(tiny_model, made, recurring(PAIRS, word="no"), per_shard=PER_SHARD)
    assert len(opened.manifest.shards) == 42 > 2 * WINDOW_GROUPS
    return opened


@pytest.fixture(scope="module")
def large_shards(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardFolder:
    """Two shards of two row groups each; other pairs."""
    made = tmp_path_factory.mktemp("large")
    return score(tiny_model, made, recurring(400, word="never"), per_shard=200)


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


def expected_order(folder: ShardFolder, held_out: set[int], *, seed: int, epoch: int) -> list[int]:
    """The order as the module describes it, with lists."""
    rng = np.random.default_rng([seed, epoch])
    index = enumerate(folder.index().to_pylist())
    grouped = itertools.groupby(index, key=lambda item: (item[1]["shard"], item[1]["row_group"]))
    groups = [[position for position, _ in group] for _, group in grouped]
    shuffled = [groups[i] for i in rng.permutation(len(groups))]
    order: list[int] = []
    while shuffled:
        window = [p for group in shuffled[:WINDOW_GROUPS] for p in group if p not in held_out]
        order += rng.permutation(window).tolist()
        shuffled = shuffled[WINDOW_GROUPS:]
    return order


@pytest.mark.parametrize("eval_split", [0.0, 0.3])
def test_the_order_shuffles_row_groups_then_rows_within_a_window(
    folder: ShardFolder, large_shards: ShardFolder, eval_split: float
) -> None:
    for opened in (folder, large_shards):
        stream = PairStream(opened, eval_split=eval_split)
        held_out = set(stream.eval_positions.tolist())
        for seed, epoch in itertools.product((0, 7), (0, 1)):
            expected = expected_order(opened, held_out, seed=seed, epoch=epoch)
            assert stream.epoch(seed=seed, epoch=epoch).tolist() == expected


def test_the_split_is_by_the_first_32_bits_of_the_prompts_hash(folder: ShardFolder) -> None:
    values = [int(p[:8], 16) / 2**32 for p in folder.index()["prompt_id"].to_pylist()]
    # A share that is a prompt's own value leaves that prompt in training.
    for share in (0.0, 1e-9, 0.1, 0.5, values[0], values[100], 0.999, 1.0):
        expected = [position for position, value in enumerate(values) if value < share]
        assert PairStream(folder, eval_split=share).eval_positions.tolist() == expected


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


def test_batches_are_consecutive_and_the_last_may_be_smaller(folder: ShardFolder) -> None:
    stream = PairStream(folder, eval_split=0.0)
    order = stream.epoch(seed=0, epoch=0)[:23]
    batches = [[p.row for p in pairs] for pairs in stream.batches(order, 8)]
    assert [len(b) for b in batches] == [8, 8, 7]
    assert [row for b in batches for row in b] == order.tolist()


# Reading ahead --------------------------------------------------------------------------------------------


def readers() -> list[str]:
    """Threads that read ahead, now."""
    return [t.name for t in threading.enumerate() if t.name.startswith("dpo-opt-read-ahead")]


def settled(count_reads: list[tuple[int, int]]) -> int:
    """How many row groups were read, when no more are being read."""
    found = -1
    while found != len(count_reads):
        found = len(count_reads)
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("size", [1, 7, 64, 500])
def test_batches_hold_the_pairs_on_disk_in_the_order_asked_for(folder: ShardFolder, size: int) -> None:
    direct = list(folder.pairs())
    stream = PairStream(folder, eval_split=0.2)
    for order in (stream.epoch(seed=5, epoch=2), stream.eval_positions, np.array([9, 9, 3, 9])):
        batches = list(stream.batches(order, size))
        assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
        found = [pair for batch in batches for pair in batch]
        assert [p.row for p in found] == order.tolist()
        for pair in found:
            np.testing.assert_array_equal(pair.rejected_ids, direct[pair.row].rejected_ids)
    assert list(stream.batches(np.array([], dtype=np.int32), size)) == []
    assert readers() == []


def test_the_next_window_is_read_while_the_first_is_used(folder: ShardFolder) -> None:
    counting = CountingFolder(folder)
    stream = PairStream(counting, eval_split=0.0)
    order = stream.epoch(seed=3, epoch=0)
    blocks = order // PER_SHARD
    with contextlib.closing(stream.batches(order, 20)) as batches:
        for _ in range(WINDOW_GROUPS * PER_SHARD // 20):  # one window
            next(batches)
        assert settled(counting.reads) == 2 * WINDOW_GROUPS - 1
    first_two = dict.fromkeys(blocks[: 2 * WINDOW_GROUPS * PER_SHARD].tolist())
    assert {shard for shard, _ in counting.reads} < set(first_two)


class Block(list[ScoredPair]):
    """A row group that can be watched."""


class WatchedFolder(ShardFolder):
    """Knows which row groups are in memory."""

    def __init__(self, folder: ShardFolder) -> None:
        super().__init__(folder.path, folder.manifest)
        self.alive: list[weakref.ref[Block]] = []
        self.most = 0

    def row_groups(self, shard: int, *, row_groups: object = None) -> Iterator[list[ScoredPair]]:
        for pairs in super().row_groups(shard, row_groups=row_groups):
            block = Block(pairs)
            self.alive.append(weakref.ref(block))
            self.most = max(self.most, sum(ref() is not None for ref in self.alive))
            yield block


@pytest.mark.parametrize("size", [16, 100, PAIRS])
def test_memory_holds_two_windows(folder: ShardFolder, size: int) -> None:
    watched = WatchedFolder(folder)
    stream = PairStream(watched, eval_split=0.0)
    for _ in stream.batches(stream.epoch(seed=0, epoch=0), size):
        time.sleep(0.02)  # a step, in which the threads read all that they may
    assert len(watched.alive) == 42
    assert WINDOW_GROUPS // 2 < watched.most <= 2 * WINDOW_GROUPS


def test_a_consumer_that_stops_early_ends_the_threads(folder: ShardFolder) -> None:
    counting = CountingFolder(folder)
    stream = PairStream(counting, eval_split=0.0)
    steps = stream.steps(seed=0, size=4)
    next(steps)
    assert readers() != []
    steps.close()
    assert readers() == []
    assert len(counting.reads) < 2 * WINDOW_GROUPS
    # Also where nobody closes it, such as in a loop that is left.
    for _ in stream.batches(stream.epoch(seed=0, epoch=0), 4):
        break
    assert readers() == []


class HeldUpFolder(CountingFolder):
    """A store that answers for one shard, and for the others not until it is let go."""

    def __init__(self, folder: ShardFolder) -> None:
        super().__init__(folder)
        self.answers = -1
        self.let_go = threading.Event()

    def row_groups(self, shard: int, *, row_groups: object = None) -> Iterator[list[ScoredPair]]:
        found = super().row_groups(shard, row_groups=row_groups)
        if shard != self.answers:
            assert self.let_go.wait(timeout=30)
        return found


def test_what_nobody_will_use_is_not_read(folder: ShardFolder) -> None:
    held_up = HeldUpFolder(folder)
    stream = PairStream(held_up, eval_split=0.0)
    held_up.answers = stream.epoch(seed=0, epoch=0)[0] // PER_SHARD
    steps = stream.steps(seed=0, size=1)
    next(steps)
    threading.Timer(0.5, held_up.let_go.set).start()
    steps.close()
    assert held_up.let_go.is_set(), "the threads were left alone with what they were reading"
    assert readers() == []
    assert len(held_up.reads) < WINDOW_GROUPS // 2


def test_a_damaged_shard_stops_the_step_that_needs_it(folder: ShardFolder, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(folder.path, tmp_path / "shards"))
    stream = PairStream(ShardFolder.open(shards), eval_split=0.0)
    order = stream.epoch(seed=0, epoch=0)
    # The block whose first pair comes last among those of the second window.
    first_use = {int(block): i for i, block in reversed(list(enumerate(order // PER_SHARD)))}
    shard = sorted(first_use, key=first_use.__getitem__)[2 * WINDOW_GROUPS - 1]
    damaged = shards / folder.manifest.shards[shard].file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    size = 8
    batches = stream.batches(order, size)
    for i in range(first_use[shard] // size):
        assert [pair.row for pair in next(batches)] == order[i * size : (i + 1) * size].tolist()
    with pytest.raises(DataError, match="the bytes changed") as caught:
        next(batches)
    assert str(damaged) in str(caught.value)
    assert readers() == []


def test_streams_of_several_folders_do_not_mix(folder: ShardFolder, large_shards: ShardFolder) -> None:
    train, other = PairStream(folder, eval_split=0.3), PairStream(large_shards, eval_split=1.0)
    assert other.train_size == 0
    assert other.eval_positions.tolist() == list(range(400))
    expected = {opened: [pair.pair_id for pair in opened.pairs()] for opened in (folder, large_shards)}
    # All of them read ahead at the same time.
    together = zip(
        train.steps(seed=1, size=5),
        train.batches(train.eval_positions, 5),
        other.batches(other.eval_positions, 5),
        strict=False,
    )
    order = train.epoch(seed=1, epoch=0)
    for i, (trained, held_out, all_other) in enumerate(together):
        part = slice(5 * i, 5 * i + 5)
        assert [p.pair_id for p in trained] == [expected[folder][p] for p in order[part]]
        assert [p.pair_id for p in held_out] == [expected[folder][p] for p in train.eval_positions[part]]
        assert [p.pair_id for p in all_other] == expected[large_shards][part]
    assert i > 10


def test_a_stores_shard_is_fetched_once_though_several_threads_want_it(
    large_shards: ShardFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPO_OPT_CACHE", str(tmp_path / "cache"))
    store = location("memory://stream/shards")
    for file in large_shards.path.rglob("*"):
        if file.is_file():
            (store / file.relative_to(large_shards.path).as_posix()).write_bytes(file.read_bytes())
    fetched = []
    fetch = shard_folder.fetch

    def slowly(path: object, file: Path) -> None:
        fetched.append(str(path))
        time.sleep(0.05)
        fetch(path, file)

    monkeypatch.setattr(shard_folder, "fetch", slowly)
    stream = PairStream(ShardFolder.open(store), eval_split=0.0)
    rows = [p.row for batch in stream.batches(stream.epoch(seed=0, epoch=0), 32) for p in batch]
    assert rows == PairStream(large_shards, eval_split=0.0).epoch(seed=0, epoch=0).tolist()
    assert sorted(fetched) == sorted(
        str(store / name)
        for name in ("index.parquet", *(shard.file for shard in large_shards.manifest.shards))
    )


# Going on where a run stopped -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [60, 128])
def test_going_on_after_any_step_gives_the_steps_of_an_uninterrupted_run(
    folder: ShardFolder, size: int
) -> None:
    stream = PairStream(folder, eval_split=0.2)
    count = 2 * -(-stream.train_size // size) + 1  # two epochs and the next one's first step
    whole = [[p.row for p in pairs] for pairs in itertools.islice(stream.steps(seed=4, size=size), count)]
    assert sorted(itertools.chain.from_iterable(whole[: count // 2])) == sorted(
        stream.epoch(seed=4, epoch=0).tolist()
    )
    assert len(whole[count // 2 - 1]) == stream.train_size % size, "an epoch's last step was not smaller"
    consumed = 0
    for done in range(count):
        again = PairStream(folder, eval_split=0.2).steps(seed=4, size=size, consumed=consumed)
        assert [[p.row for p in pairs] for pairs in itertools.islice(again, count - done)] == whole[done:]
        consumed += len(whole[done])


def test_going_on_reads_nothing_that_was_consumed(folder: ShardFolder) -> None:
    counting = CountingFolder(folder)
    stream = PairStream(counting, eval_split=0.0)
    order = stream.epoch(seed=0, epoch=0)
    consumed = 2 * WINDOW_GROUPS * PER_SHARD + 40
    with contextlib.closing(stream.steps(seed=0, size=20, consumed=consumed)) as steps:
        rows = [p.row for pairs in itertools.islice(steps, 3) for p in pairs]
        settled(counting.reads)
    assert rows == order[consumed : consumed + 60].tolist()
    assert {shard for shard, _ in counting.reads} == set((order[consumed:] // PER_SHARD).tolist())
    assert len(counting.reads) == len(set(counting.reads)) == 10


def test_another_batch_size_goes_on_with_the_same_order(folder: ShardFolder) -> None:
    stream = PairStream(folder, eval_split=0.0)
    order = stream.epoch(seed=0, epoch=1).tolist()
    with contextlib.closing(stream.steps(seed=0, size=100, consumed=PAIRS + 33)) as steps:
        rows = [[p.row for p in pairs] for pairs in itertools.islice(steps, 4)]
    assert rows == [order[33:133], order[133:233], order[233:333], order[333:]]


# Whole prompts --------------------------------------------------------------------------------------------


def ranked_folder(model: Path, made: Path) -> ShardFolder:
    """60 prompts of 1 to 5 pairs, and one of 13, which is more than a step's; row groups of 16 pairs."""
    counts = [1 + i % 5 for i in range(60)]
    counts[7] = 13
    rows = [
        {"prompt": f"prompt {i}:", "chosen": f" yes {i} {j}", "rejected": f" no {i} {j}"}
        for i, count in enumerate(counts)
        for j in range(count)
    ]
    return score(model, made, rows, per_shard=16)


@pytest.fixture(scope="module")
def ranked(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardFolder:
    return ranked_folder(tiny_model, tmp_path_factory.mktemp("ranked"))


SIZE = 8


@pytest.mark.parametrize("eval_split", [0.0, 0.2])
def test_all_pairs_of_a_prompt_meet_in_one_step(ranked: ShardFolder, eval_split: float) -> None:
    stream = PairStream(ranked, eval_split=eval_split, by_prompt=True)
    count = stream.count_steps(seed=3, size=SIZE, epochs=2)
    steps = list(itertools.islice(stream.steps(seed=3, size=SIZE), count))
    rows = [pair.row for pairs in steps for pair in pairs]
    assert sorted(rows) == sorted(stream.epoch(seed=3, epoch=0).tolist() * 2)
    assert max(map(len, steps)) <= SIZE
    where: dict[bytes, set[int]] = {}
    size_of: dict[bytes, int] = {}
    for number, pairs in enumerate(steps):
        for pair in pairs:
            prompt = pair.prompt_ids.tobytes()
            where.setdefault(prompt, set()).add(number)
            size_of[prompt] = size_of.get(prompt, 0) + 1
    # Each prompt comes in both epochs, and the one of 13 pairs takes two steps in each.
    assert all(len(numbers) == (4 if size_of[prompt] == 26 else 2) for prompt, numbers in where.items())
    # Steps are as full as whole prompts allow: no two in a row would have fitted into one.
    lengths = [len(pairs) for pairs in steps[: stream.count_steps(seed=3, size=SIZE, epochs=1)]]
    assert all(a + b > SIZE for a, b in itertools.pairwise(lengths))


def test_prompts_come_in_an_order_of_their_own_and_the_run_goes_on_in_it(ranked: ShardFolder) -> None:
    stream = PairStream(ranked, eval_split=0.2, by_prompt=True)
    count = stream.count_steps(seed=4, size=SIZE, epochs=2) + 1
    whole = [[p.row for p in pairs] for pairs in itertools.islice(stream.steps(seed=4, size=SIZE), count)]
    assert whole[0] != [p.row for p in next(stream.steps(seed=5, size=SIZE))]
    assert whole[0] != sorted(whole[0]) or whole[1] != sorted(whole[1]) or whole[0][0] > whole[1][0]
    consumed = 0
    for done in range(0, count):
        again = PairStream(ranked, eval_split=0.2, by_prompt=True).steps(seed=4, size=SIZE, consumed=consumed)
        found = [[p.row for p in pairs] for pairs in itertools.islice(again, min(2, count - done))]
        assert found == whole[done : done + 2]
        consumed += len(whole[done])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({3: -0.64}, "row 3 has the weight -0.64"),
        (dict.fromkeys(range(PAIRS), 0.0), "are 0"),
        (dict.fromkeys(range(PAIRS), 1e308), "add up to infinity"),
    ],
)
def test_weights_that_would_train_nothing_or_the_reverse_are_refused_when_training_opens_them(
    folder: ShardFolder, tmp_path: Path, values: dict[int, float], said: str
) -> None:
    copied = tmp_path / "shards"
    shutil.copytree(str(folder.path), copied)
    write_column(copied, WEIGHT, Column(array("q", values), array("d", values.values())))
    with pytest.raises(DataError, match=said) as caught:
        PairStream(ShardFolder.open(copied), eval_split=0.0)
    assert "weight.parquet" in str(caught.value.where)


def test_a_lost_file_of_weights_is_not_read_as_no_weights(folder: ShardFolder) -> None:
    named = folder.manifest.model_copy(update={"columns": {WEIGHT: planned_file(WEIGHT, [], [])}})
    with pytest.raises(DataError, match="the weight of the pairs is missing") as caught:
        PairStream(ShardFolder(folder.path, named), eval_split=0.0)
    assert "dpo-opt precompute" in str(caught.value.fix)
