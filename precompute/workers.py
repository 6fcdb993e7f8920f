"""Which shards a worker takes, and in what order: no coordinator, any number of workers, any of them may die.

Each begins with a share of its own and then helps with whatever is left. Two that score the same shard waste
time, never data: of two commits readers take one.
"""

import random
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from dpo_opt.precompute.commits import committed, is_committed
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.locations import AnyPath
from dpo_opt.schemas.manifest import Plan, ShardRange


class Worker(NamedTuple):
    """One of several workers."""

    number: int
    of: int


def worker_from_environment(environment: Mapping[str, str]) -> Worker | None:
    """The worker that a scheduler says this process is; None where it is the only one.

    Read from a Slurm array (``SLURM_ARRAY_TASK_ID``, ``_MIN``, ``_COUNT``, ``_STEP``) or from what torchrun
    and others set (``RANK``, ``WORLD_SIZE``).

    Raises:
        ConfigError: The variables are no numbers, or contradict each other.
    """
    try:
        if "SLURM_ARRAY_TASK_ID" in environment:
            first = int(environment.get("SLURM_ARRAY_TASK_MIN", "0"))
            step = int(environment.get("SLURM_ARRAY_TASK_STEP", "1"))
            index = (int(environment["SLURM_ARRAY_TASK_ID"]) - first) // step
            # An array of a few tasks of an earlier one may name any of them.
            found = Worker(index, max(int(environment.get("SLURM_ARRAY_TASK_COUNT", "1")), index + 1))
        elif "RANK" in environment and "WORLD_SIZE" in environment:
            found = Worker(int(environment["RANK"]), int(environment["WORLD_SIZE"]))
        else:
            return None
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(
            f"the scheduler's variables do not say which worker this is ({error})",
            fix="pass --worker-index and --num-workers",
        ) from error
    return found if found.of > 1 else None


def shards_for(worker: Worker, plan: Plan, shards_dir: AnyPath) -> Iterator[ShardRange]:
    """Shards without a commit, the worker's own share first; looked up again before each one."""
    total = len(plan.shards)
    begin, end = (total * i // worker.of for i in (worker.number, worker.number + 1))
    others = [*plan.shards[end:], *plan.shards[:begin]]
    # Workers that have finished their share spread over what is left, instead of queueing at one shard.
    random.Random(worker.number).shuffle(others)
    done = committed(shards_dir, plan)
    for shard in [*plan.shards[begin:end], *others]:
        if shard.shard not in done and not is_committed(shards_dir, shard, plan):
            yield shard
