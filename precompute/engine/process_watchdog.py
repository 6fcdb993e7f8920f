"""Kills an engine's processes when the process that started them is gone, however it ended.

vLLM runs an engine in child processes if it is told to (``VLLM_ENABLE_V1_MULTIPROCESSING=1``) or if it spans
several GPUs. If the parent is killed, such a child waits for it forever and keeps all of its memory. The
kernel can signal a child when its parent dies, but the child must ask for it, and the child runs none of this
program's code. So a small process watches from outside: this file, run by itself with only the standard
library.
"""

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_SECONDS_BETWEEN_LOOKS = 0.5


@contextlib.contextmanager
def children_end_with_this_process() -> Iterator[None]:
    """Processes that the block starts are killed when this process is gone; earlier children are not.

    Without ``/proc`` it does nothing.
    """
    if not Path("/proc/self/task").is_dir():
        yield
        return
    others = set(_children(os.getpid()))
    begun, end = os.pipe()
    # -I -S: only the standard library, regardless of the environment.
    watcher = os.posix_spawn(
        sys.executable,
        [sys.executable, "-I", "-S", __file__, str(os.getpid()), *map(str, others)],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, begun, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        # A session of its own, so that Ctrl-C does not end the watcher.
        setsid=True,
    )
    os.close(begun)
    try:
        yield
    finally:
        begun_here = set(_children(os.getpid())) - others - {watcher}
        with contextlib.suppress(BrokenPipeError):
            os.write(end, " ".join(map(str, begun_here)).encode() + b"\n")
        os.close(end)


def _watch(parent: int, others: set[int]) -> None:
    """Kill the parent's children and their descendants when the parent is gone.

    These are all children except ``others``, until a line on stdin names the ones to watch.
    """
    starting = True
    others = {*others, os.getpid()}
    # With their start times, because a process number may be used again.
    found: dict[int, str] = {}
    while True:
        gone = os.getppid() != parent
        born = set(_children(parent)) - others if starting else set()
        for pid in [*born, *found]:
            _collect(pid, found)
        found = {pid: start for pid, start in found.items() if start_time(pid) == start}
        if gone:
            for pid in found:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            return
        if not starting and not found:
            return
        if not starting:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        elif select.select([0], [], [], _SECONDS_BETWEEN_LOOKS)[0]:
            line = os.read(0, 65536)
            if not line:
                # The pipe closed because the parent died; getppid shows it a moment later.
                time.sleep(_SECONDS_BETWEEN_LOOKS / 10)
                continue
            found = {}
            for pid in map(int, line.split()):
                _collect(pid, found)
            starting = False


def _collect(pid: int, found: dict[int, str]) -> None:
    """Add a process and all its descendants to ``found``."""
    start = start_time(pid)
    if start is None or found.get(pid, start) != start:
        return
    found[pid] = start
    for child in _children(pid):
        _collect(child, found)


def _children(pid: int) -> list[int]:
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return []
    children: list[int] = []
    for thread in threads:
        with contextlib.suppress(OSError):
            children += map(int, (thread / "children").read_text().split())
    return children


def start_time(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None if it does not exist or has ended."""
    try:
        # The process's name, in brackets, may hold any character.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


if __name__ == "__main__":
    _watch(int(sys.argv[1]), set(map(int, sys.argv[2:])))
