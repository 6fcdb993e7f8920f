"""Processes of a machine load in turns where its memory does not hold a copy for each."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dpo_opt.optimize.processes import turns
from dpo_opt.optimize.processes.distributed import World

GB = 10**9


def most_at_once(
    monkeypatch: pytest.MonkeyPatch, machines: list[int], *, free: int, memory: int
) -> tuple[int, list[int]]:
    """Most loads of one machine that ran together, and what each process got; threads stand for processes."""
    places = [(machine, local) for machine, size in enumerate(machines) for local in range(size)]
    world_size = len(places)
    barrier = threading.Barrier(world_size)
    numbers: dict[int, int] = {}

    def least(value: int, world: World) -> int:
        numbers[world.rank] = value
        barrier.wait()
        found = min(numbers.values())
        barrier.wait()
        return found

    monkeypatch.setattr(turns, "least_of_ranks", least)
    monkeypatch.setattr(turns, "wait_for_all", lambda world: barrier.wait())
    monkeypatch.setattr(turns, "free_main_memory", lambda: free)
    lock, running, most = threading.Lock(), [0] * len(machines), [0] * len(machines)

    def load(rank: int) -> int:
        machine, local = places[rank]

        def work() -> int:
            with lock:
                running[machine] += 1
                most[machine] = max(most[machine], running[machine])
            time.sleep(0.02)
            with lock:
                running[machine] -= 1
            return rank

        world = World(rank, world_size, local, torch.device("cpu"), "env://")
        return turns.in_turns(work, world, memory=memory)

    with ThreadPoolExecutor(world_size) as pool:
        results = list(pool.map(load, range(world_size)))
    return max(most), results


@pytest.mark.parametrize(
    ("free", "expected"), [(10 * GB, 1), (300 * GB, 1), (800 * GB, 2), (1100 * GB, 3), (9000 * GB, 8)]
)
def test_as_many_load_at_once_as_memory_holds(
    monkeypatch: pytest.MonkeyPatch, free: int, expected: int
) -> None:
    """70B in fp32 on eight GPUs: 280 GB each."""
    found, results = most_at_once(monkeypatch, [8], free=free, memory=280 * GB)
    assert results == list(range(8))
    assert found <= expected
    assert found > (1 if expected > 1 else 0)


def test_machines_of_other_sizes_take_as_many_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    found, results = most_at_once(monkeypatch, [4, 2], free=100 * GB, memory=90 * GB)
    assert (found, results) == (1, list(range(6)))


def test_the_limit_of_a_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = turns.free_main_memory()
    assert 0 < machine < 2**50
    monkeypatch.setattr(turns, "_CONTROL_GROUPS", tmp_path)
    assert turns.free_main_memory() == pytest.approx(machine, rel=0.5)
    (tmp_path / "memory.stat").write_text("anon 600\nfile 100000\n")
    for limit, expected in (("max", machine), ("1000", 400)):
        (tmp_path / "memory.max").write_text(limit + "\n")
        assert turns.free_main_memory() == pytest.approx(expected, rel=0.5)
