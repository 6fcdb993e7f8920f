"""Processes of one machine load the model in turns where main memory does not hold a copy for each."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dpo_opt.optimize.processes.distributed import World, least_of_ranks, wait_for_all

T = TypeVar("T")

# The rest is for what else the processes hold, and for a file's pages on their way.
_USABLE = 0.8
_CONTROL_GROUPS = Path("/sys/fs/cgroup")


def in_turns(work: Callable[[], T], world: World, *, memory: int) -> T:
    """Do one piece of work on every process, on as many of a machine at a time as its memory allows.

    Each has freed what it took, but for its part of the model, when the next begin.

    Args:
        work: It exchanges nothing with other processes.
        world: The run's processes.
        memory: Bytes of main memory, at least 1, that the work takes for a while on each process.

    Returns:
        What this process's work gave back.
    """
    if world.size == 1:
        return work()
    at_once = max(1, least_of_ranks(int(_USABLE * free_main_memory()) // memory, world))
    turns = 1 - least_of_ranks(-world.local_rank, world) // at_once
    result: list[T] = []
    for turn in range(turns):
        if world.local_rank // at_once == turn:
            result.append(work())
        wait_for_all(world)
    return result[0]


def free_main_memory() -> int:
    """Bytes that this process can still allocate: of the machine's, or of its control group's limit."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = [1024 * int(fields["MemAvailable"].split()[0])]
    group = Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2].lstrip("/")
    for folder in (_CONTROL_GROUPS / group, *(_CONTROL_GROUPS / group).parents):
        if folder.is_relative_to(_CONTROL_GROUPS) and (folder / "memory.max").is_file():
            limit = (folder / "memory.max").read_text().strip()
            # Its file pages are given back where memory is short.
            used = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            free += [] if limit == "max" else [int(limit) - int(used["anon"])]
    return min(free)
