"""The automatic budget: what fits, with devices made of arithmetic; a real one is tested in tests/gpu."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_opt.optimize.forward.packing import packed_size, pair_group
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.memory.budget import (
    CPU_ROWS,
    MOST_ROWS,
    Room,
    choose_budget,
    fit_budget,
    least_budget,
    longest_pair,
)
from dpo_opt.optimize.processes.distributed import World
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.pairs import TokenSequence
from dpo_opt.schemas.shard_folder import ShardFolder

GB = 10**9
CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU, None)


def device(*, free: int, per_row: int, constant: int, rows: int) -> Callable[[int], int]:
    """Takes so much per row and so much at once, and has no more than ``free``."""

    def peak(copies: int) -> int:
        needed = constant + per_row * rows * copies
        if needed > free:
            raise torch.OutOfMemoryError(f"{needed} > {free}")
        return needed

    return peak


def budget(*, free: int, per_row: int, constant: int, rows: int) -> int:
    peak = device(free=free, per_row=per_row, constant=constant, rows=rows)
    return fit_budget(peak, rows=rows, room=Room(free, 2 * free), world=ALONE)


@pytest.mark.parametrize("rows", [100, 640, 2048, 4000])
@pytest.mark.parametrize("constant", [0, GB // 4])
def test_what_is_free_is_filled_and_no_more(rows: int, constant: int) -> None:
    found = budget(free=10 * GB, per_row=1_000_000, constant=constant, rows=rows)
    assert isinstance(found, int)
    assert 0.84 * 10 * GB < constant + found * 1_000_000 <= 0.85 * 10 * GB


def test_more_rows_than_make_it_faster_are_not_taken() -> None:
    assert budget(free=1000 * GB, per_row=1_000_000, constant=0, rows=300) == MOST_ROWS
    assert budget(free=1000 * GB, per_row=1_000_000, constant=0, rows=2 * MOST_ROWS) == 2 * MOST_ROWS


@pytest.mark.parametrize("free_rows", [900, 1300, 1700, 2500, 3500, 9000])
@pytest.mark.parametrize("constant_rows", [0, 250])
def test_packs_that_will_not_fit_are_not_tried(free_rows: int, constant_rows: int) -> None:
    tried: list[int] = []
    fits = device(free=free_rows * 10**6, per_row=10**6, constant=constant_rows * 10**6, rows=300)

    def peak(copies: int) -> int:
        tried.append(copies)
        return fits(copies)

    found = fit_budget(peak, rows=300, room=Room(free_rows * 10**6, 10**12), world=ALONE)
    assert found == pytest.approx(0.85 * free_rows - constant_rows, abs=1)
    assert tried == [0, *(2**i for i in range(len(tried) - 1))]
    assert constant_rows + 300 * tried[-1] <= 0.85 * free_rows
    # The next would not have fitted, or it was enough to know what a row takes.
    assert constant_rows + 600 * tried[-1] > 0.85 * free_rows or 300 * tried[-1] >= 4096


def test_where_peaks_are_no_straight_line_only_what_was_seen_to_fit_is_used() -> None:
    tried: list[int] = []

    def peak(copies: int) -> int:
        tried.append(copies)
        if copies == 4:
            raise torch.OutOfMemoryError
        return 10**6 * 300 * copies

    assert fit_budget(peak, rows=300, room=Room(10 * GB, 20 * GB), world=ALONE) == 600
    assert tried == [0, 1, 2, 4]


def test_the_longest_pair_may_use_what_is_otherwise_kept_free() -> None:
    assert budget(free=GB, per_row=1_000_000, constant=0, rows=950) == 950


def test_a_pair_that_does_not_fit_is_refused_with_what_helps() -> None:
    with pytest.raises(ConfigError, match=r"the longest pair \(1200 token rows\) does not fit") as caught:
        budget(free=GB, per_row=1_000_000, constant=0, rows=1200)
    assert "--activation-checkpointing full" in str(caught.value)
    assert "--max-length" in str(caught.value)
    # The probe fitted, but the optimizer is still to come.
    peak = device(free=4 * GB, per_row=1_000_000, constant=0, rows=1200)
    with pytest.raises(ConfigError, match=r"0\.2 GB are missing"):
        fit_budget(peak, rows=1200, room=Room(GB, 4 * GB), world=ALONE)


def test_on_a_cpu_the_budget_is_small_and_always_the_same(policy: Policy) -> None:
    def group(length: int) -> tuple[TokenSequence, ...]:
        ids = np.arange(length + 1, dtype=np.int32)
        return (TokenSequence(ids[:4], ids[4:]), TokenSequence(ids[:4], ids[::-1][4:]))

    assert choose_budget(policy, group(60)) == CPU_ROWS
    rows = packed_size(group(900))
    assert rows > CPU_ROWS
    assert choose_budget(policy, group(900)) == rows
    padded = Policy(policy.model, CPU, torch.float32, packs=False)
    assert choose_budget(padded, group(900)) == 2 * 900
    assert all(parameter.grad is None for parameter in policy.model.parameters())


def test_the_longest_pair_is_found_without_reading_the_others(shards: Path) -> None:
    folder = ShardFolder.open(shards)
    sizes = {
        pair.row: len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)
        for shard in range(len(folder.manifest.shards))
        for pairs in folder.row_groups(shard)
        for pair in pairs
    }
    found = longest_pair(folder)
    assert sizes[found.row] == max(sizes.values())
    assert least_budget(found, CPU) == CPU_ROWS
    assert least_budget(found, torch.device("cuda")) == packed_size(pair_group(found))
