"""No process of an engine outlives the one that started it, however that one ends.

vLLM runs an engine in child processes where it is told to (``VLLM_ENABLE_V1_MULTIPROCESSING=1``) and where it
spans several GPUs, and such a child waits for ever for a parent that was killed, with all of its memory. The
kernel can signal a child when its parent dies, but must be asked in the child, where nothing of this program
runs. So a small process watches from outside: this file, run by itself, with the standard library alone.
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
    """What the block starts is killed when this process is no more; what was there before is not.

    Where there is no ``/proc`` to look at, it does nothing.
    """
    if not Path("/proc/self/task").is_dir():
        yield
        return
    others = set(_children(os.getpid()))
    begun, end = os.pipe()
    # -I -S: nothing but the standard library, whatever the environment says.
    watcher = os.posix_spawn(
        sys.executable,
        [sys.executable, "-I", "-S", __file__, str(os.getpid()), *map(str, others)],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, begun, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        # A Ctrl-C is for the others.
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
    """Kill the parent's children, and theirs, when the parent is gone: new ones until a line names them."""
    starting = True
    others = {*others, os.getpid()}
    # With their start times: a number may be given again.
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
                # The parent died at its start, and shows it in a moment.
                time.sleep(_SECONDS_BETWEEN_LOOKS / 10)
                continue
            found = {}
            for pid in map(int, line.split()):
                _collect(pid, found)
            starting = False


def _collect(pid: int, found: dict[int, str]) -> None:
    """A process and all that descend from it."""
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
    """In clock ticks since boot; None where there is no such process, or only its exit code."""
    try:
        # The name, in brackets, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


if __name__ == "__main__":
    _watch(int(sys.argv[1]), set(map(int, sys.argv[2:])))
