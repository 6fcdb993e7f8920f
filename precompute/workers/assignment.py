"""Which shards a worker takes, and in what order: no coordinator, any number of workers, any of them may die.

Each begins with a share of its own and then helps with whatever is left. A worker marks the shard that it is
at, so a helper takes one that nobody is at, and waits for the last ones. Two that are at the same shard all
the same waste time, never data: of two commits readers take one.
"""

import json
import os
import random
import re
import secrets
import socket
import time
from collections.abc import Generator, Mapping
from typing import NamedTuple

from dpo_opt.precompute.engine.process_watchdog import start_time
from dpo_opt.precompute.shards.commits import committed, is_committed
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.locations import AnyPath, read_all, remove, sizes
from dpo_opt.schemas.manifest import COMMITS, Plan, ShardCommit, ShardRange
from dpo_opt.schemas.progress import Progress, Silent
from dpo_opt.schemas.storage import write_text

# Named as a private file: readers pass over it, and gc removes what a kill left.
_MARK = re.compile(r"\.\d{5,}\.00000000\.tmp")
_SECONDS_BETWEEN_LOOKS = 1.0
_LEAST_PATIENCE = 10.0
_PATIENCE_WITHOUT_EXPERIENCE = 600.0
"""Seconds that a mark is believed as long as nothing says how long a shard takes."""
_LONGER = 3
"""A shard may take so many times as long as any before; whoever is at it longer is taken for dead."""


class Worker(NamedTuple):
    """One of several workers."""

    number: int
    of: int


def worker_from_environment(environment: Mapping[str, str]) -> Worker | None:
    """The worker that a scheduler says this process is; None where it is the only one.

    Read from a Slurm array (``SLURM_ARRAY_TASK_ID``, ``_MIN``, ``_COUNT``, ``_STEP``), from what torchrun and
    others set (``RANK``, ``WORLD_SIZE``), or from a step of several tasks (``srun -n``: ``SLURM_PROCID``,
    ``SLURM_STEP_NUM_TASKS``), also in each task of an array.

    Raises:
        ConfigError: The variables are no numbers, or contradict each other.
    """
    try:
        found = Worker(0, 1)
        # Not SLURM_NTASKS: a batch script has it too, and runs once.
        if "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
            found = Worker(int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"]))
        if "SLURM_ARRAY_TASK_ID" in environment:
            first = int(environment.get("SLURM_ARRAY_TASK_MIN", "0"))
            step = int(environment.get("SLURM_ARRAY_TASK_STEP", "1"))
            index = (int(environment["SLURM_ARRAY_TASK_ID"]) - first) // step
            # An array of a few tasks of an earlier one may name any of them.
            tasks = max(int(environment.get("SLURM_ARRAY_TASK_COUNT", "1")), index + 1)
            found = Worker(index * found.of + found.number, tasks * found.of)
        elif "RANK" in environment and "WORLD_SIZE" in environment:
            found = Worker(int(environment["RANK"]), int(environment["WORLD_SIZE"]))
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(
            f"the scheduler's variables do not say which worker this is ({error})",
            fix="pass --worker-index and --num-workers",
        ) from error
    return found if found.of > 1 else None


def shards_for(
    worker: Worker, plan: Plan, shards_dir: AnyPath, *, progress: Progress | None = None
) -> Generator[ShardRange, None, None]:
    """Shards without a commit, the worker's own share first; looked up again before each one.

    A shard that another is at comes last: it is given out when its worker is dead, or seems to be.

    Args:
        worker: Who asks.
        plan: Of the folder.
        shards_dir: The folder.
        progress: Told of waiting.
    """
    total = len(plan.shards)
    begin, end = (total * i // worker.of for i in (worker.number, worker.number + 1))
    others = [*plan.shards[end:], *plan.shards[:begin]]
    # Workers that have finished their share spread over what is left, instead of queueing at one shard.
    random.shuffle(others)
    done = committed(shards_dir, plan)
    left = [shard for shard in [*plan.shards[begin:end], *others] if shard.shard not in done]
    marks = _Marks(shards_dir, done)
    waiting = False
    while left:
        busy = marks.shards_in_work()
        shard = next((shard for shard in left if shard.shard not in busy), None)
        if shard is not None:
            if is_committed(shards_dir, shard, plan):
                left.remove(shard)
            elif marks.set(shard.shard):
                left.remove(shard)
                before = time.monotonic()
                try:
                    # Its worker may have committed it since.
                    if not is_committed(shards_dir, shard, plan):
                        yield shard
                        marks.learn(time.monotonic() - before)
                finally:
                    marks.clear(shard.shard)
            continue
        left = [shard for shard in left if not is_committed(shards_dir, shard, plan)]
        if left:
            if not waiting:
                numbers = ", ".join(str(shard.shard) for shard in left)
                (progress or Silent()).say(f"waiting: other workers are at what is left (shards {numbers})")
            waiting = True
            time.sleep(_SECONDS_BETWEEN_LOOKS)


_set_here: set[str] = set()
"""Marks of this process."""


class _Marks:
    """What other workers are at, and how long that is believed."""

    def __init__(self, shards_dir: AnyPath, done: Mapping[int, ShardCommit]) -> None:
        self._commits = shards_dir / COMMITS
        self._longest = max((commit.seconds or 0.0 for commit in done.values()), default=0.0)
        # By this process's clock: those of machines and file systems differ.
        self._first_seen: dict[tuple[int, bytes], float] = {}
        self._stale: set[int] = set()

    def learn(self, seconds: float) -> None:
        """How long a shard took."""
        self._longest = max(self._longest, seconds)

    def shards_in_work(self) -> set[int]:
        """Shards that others are at."""
        names = [name for name in sizes(self._commits, prefix=".") if _MARK.fullmatch(name)]
        marks = {
            (int(name[1:].partition(".")[0]), text) for name, text in read_all(self._commits, names).items()
        }
        now = time.monotonic()
        self._first_seen = {mark: self._first_seen.get(mark, now) for mark in marks}
        busy = {mark[0] for mark in marks if now - self._first_seen[mark] < self._patience(mark[1])}
        self._stale = {shard for shard, _ in marks} - busy
        return busy

    def set(self, shard: int) -> bool:
        """Whether this process is the one at a shard now."""
        token = secrets.token_hex(4)
        _set_here.add(token)
        text = json.dumps([socket.gethostname(), os.getpid(), token, start_time(os.getpid())])
        try:
            write_text(self._path(shard), text, replace=shard in self._stale)
        except FileExistsError:
            return False
        return True

    def clear(self, shard: int) -> None:
        """This process is no longer at it."""
        remove(self._path(shard))

    def _path(self, shard: int) -> AnyPath:
        return self._commits / f".{shard:05d}.00000000.tmp"

    def _patience(self, text: bytes) -> float:
        """Seconds that a mark is believed from when it was first seen."""
        if _is_gone(text):
            return 0.0
        return (
            max(_LEAST_PATIENCE, _LONGER * self._longest) if self._longest else _PATIENCE_WITHOUT_EXPERIENCE
        )


def _is_gone(text: bytes) -> bool:
    """Whether a process of this machine has ended; of another machine nothing is known.

    A container that is started again has the process number of the one that was killed, and any other process
    may be given it. One that waits for its parent to take its exit code has ended, too.
    """
    try:
        # Earlier versions wrote no start time.
        host, process, token, *begun = json.loads(text)
        if host != socket.gethostname():
            return False
        if int(process) == os.getpid():
            return token not in _set_here
        is_own = _may_signal(int(process))
    except ProcessLookupError:
        return True
    except (ValueError, TypeError, OverflowError):
        return False
    begins = start_time(int(process))
    if begins is None:
        # Another user's may be hidden.
        return is_own and start_time(os.getpid()) is not None
    return begun not in ([], [None], [begins])


def _may_signal(process: int) -> bool:
    """Whether a process is this user's.

    Raises:
        ProcessLookupError: There is none.
    """
    try:
        os.kill(process, 0)
    except PermissionError:
        return False
    return True
