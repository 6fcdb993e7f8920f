"""Decides which shards a worker scores, and in what order. There is no coordinator, and any worker may die.

Each worker first scores its own slice of the shards, and then helps with the rest. A worker marks the shard
that it is scoring, so a helper takes a shard without a mark, and waits for the last ones. If two workers
score the same shard all the same, they waste time but no data, because readers take one of the two commits.
"""

import json
import os
import random
import re
import secrets
import socket
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import NamedTuple

from dpo_opt.precompute.engine.process_watchdog import start_time
from dpo_opt.precompute.shards.commits import committed, is_committed
from dpo_opt.schemas.errors import ConfigError, DpoOptError, quoted
from dpo_opt.schemas.locations import AnyPath, read_all, remove, sizes
from dpo_opt.schemas.manifest import COMMITS, Plan, ShardCommit, ShardRange
from dpo_opt.schemas.progress import Progress, Silent
from dpo_opt.schemas.storage import write_text

# Named like a private file: readers ignore it, and gc removes those of killed workers.
_MARK = re.compile(r"\.\d{5,}\.00000000\.tmp")
_SECONDS_BETWEEN_LOOKS = 1.0
_LEAST_PATIENCE = 10.0
_PATIENCE_WITHOUT_EXPERIENCE = 600.0
"""Seconds that a mark is believed while no finished shard shows how long one takes."""
_LONGER = 3
"""A worker that needs this many times as long as the slowest shard so far is taken for dead."""


class Worker(NamedTuple):
    """One of several workers."""

    number: int
    of: int


def worker_from_environment(environment: Mapping[str, str]) -> Worker | None:
    """The worker that this process is, by the scheduler's variables; None if it is the only one.

    Read from a Slurm array (``SLURM_ARRAY_TASK_ID``, ``_MIN``, ``_COUNT``, ``_STEP``), from what torchrun and
    others set (``RANK``, ``WORLD_SIZE``), or from a step of several tasks (``srun -n``: ``SLURM_PROCID``,
    ``SLURM_STEP_NUM_TASKS``), also in each task of an array.

    Raises:
        ConfigError: The variables are no numbers, or contradict each other.
    """
    try:
        found = Worker(0, 1)
        # Not SLURM_NTASKS: a batch script, which runs once, has it too.
        if "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
            found = Worker(int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"]))
        if "SLURM_ARRAY_TASK_ID" in environment:
            first = int(environment.get("SLURM_ARRAY_TASK_MIN", "0"))
            step = int(environment.get("SLURM_ARRAY_TASK_STEP", "1"))
            index = (int(environment["SLURM_ARRAY_TASK_ID"]) - first) // step
            # If some tasks of an array are submitted again, their numbers are those of the first array.
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
    """Shards without a commit, the worker's own slice first; commits are looked up again before each one.

    A shard that another worker has marked comes last: it is yielded when that worker is dead, or seems to be.

    Args:
        worker: Which of the workers this is.
        plan: Of the folder.
        shards_dir: The folder.
        progress: Told of waiting.
    """
    total = len(plan.shards)
    begin, end = (total * i // worker.of for i in (worker.number, worker.number + 1))
    others = [*plan.shards[end:], *plan.shards[:begin]]
    # Shuffled, so that workers which have finished their slices do not all wait for the same shard.
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
                    # Another worker may have committed it meanwhile.
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
"""Tokens of the marks that this process has set."""


class _Marks:
    """The marks of shards that workers are scoring, and how long each mark is believed."""

    def __init__(self, shards_dir: AnyPath, done: Mapping[int, ShardCommit]) -> None:
        self._commits = shards_dir / COMMITS
        self._longest = max((commit.seconds or 0.0 for commit in done.values()), default=0.0)
        # By this process's clock, because the clocks of machines and file systems differ.
        self._first_seen: dict[tuple[int, bytes], float] = {}
        self._stale: set[int] = set()

    def learn(self, seconds: float) -> None:
        """Take note of how long a shard took."""
        self._longest = max(self._longest, seconds)

    def shards_in_work(self) -> set[int]:
        """Shards with a mark that is believed."""
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
        """Mark a shard; False if another worker has marked it.

        Raises:
            DpoOptError: A folder has the mark's name.
        """
        path, token = self._path(shard), secrets.token_hex(4)
        _set_here.add(token)
        text = json.dumps([socket.gethostname(), os.getpid(), token, start_time(os.getpid())])
        try:
            write_text(path, text, replace=shard in self._stale or _is_no_mark(path))
        except FileExistsError:
            return False
        except IsADirectoryError as error:
            raise DpoOptError(
                f"a folder has the name by which a worker marks shard {shard}",
                where=str(path),
                why="without a mark, several workers would score the shard at once",
                fix=f"rm -r {quoted(path)}, then run the same command again",
            ) from error
        return True

    def clear(self, shard: int) -> None:
        """Remove this process's mark."""
        remove(self._path(shard))

    def _path(self, shard: int) -> AnyPath:
        return self._commits / f".{shard:05d}.00000000.tmp"

    def _patience(self, text: bytes) -> float:
        """Seconds that a mark is believed after it was first seen."""
        if _is_gone(text):
            return 0.0
        return (
            max(_LEAST_PATIENCE, _LONGER * self._longest) if self._longest else _PATIENCE_WITHOUT_EXPERIENCE
        )


def _is_no_mark(path: AnyPath) -> bool:
    """Whether something is there that no worker sets: a folder, a pipe, or a link to no file."""
    return isinstance(path, Path) and os.path.lexists(path) and not path.is_file()


def _is_gone(text: bytes) -> bool:
    """Whether the process that set a mark has ended; False if it runs on another machine.

    The system may give the number of a killed process to a new one, and does so when a container is started
    again. So the start times are compared too. A process whose parent has not read its exit code has ended.
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
    except (ValueError, TypeError, OverflowError, RecursionError):
        return False
    begins = start_time(int(process))
    if begins is None:
        # The system may hide the processes of other users.
        return is_own and start_time(os.getpid()) is not None
    return begun not in ([], [None], [begins])


def _may_signal(process: int) -> bool:
    """Whether this user may signal a process.

    Raises:
        ProcessLookupError: There is none.
    """
    try:
        os.kill(process, 0)
    except PermissionError:
        return False
    return True
