"""What a command took: seconds, and peak memory of its processes together."""

import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# Of one core, at most: walking the pages of a large process takes a while, and stops it from getting more.
_SHARE_OF_A_CORE = 0.02


class Measured(NamedTuple):
    """One finished command."""

    seconds: float
    """Start-up included."""
    gigabytes: float
    """Resident, of all its processes at the worst moment; a page that several of them share counts once."""
    output: str


def run(command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> Measured:
    """Run a command to its end.

    Raises:
        SystemExit: It failed.
    """
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    output: list[str] = []
    # Reads to the end, so that a full pipe never stops the command.
    watch = threading.Thread(target=lambda: output.append(process.communicate()[0]))
    watch.start()
    peak, pause = 0, 0.1
    while watch.is_alive():
        looked = time.perf_counter()
        peak = max(peak, _tree_bytes(process.pid))
        pause = max(0.1, (time.perf_counter() - looked) / _SHARE_OF_A_CORE)
        watch.join(pause)
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:4])} ... ended with {process.returncode}")
    return Measured(time.perf_counter() - began, peak / 1e9, output[0])


def _tree_bytes(pid: int) -> int:
    """Of one process its highest mark so far, which the kernel keeps; of several, what they hold just now."""
    tree = _tree(pid)
    total = 0
    for process in tree:
        try:
            if len(tree) == 1:
                return _kilobytes(Path(f"/proc/{process}/status"), "VmHWM:") * 1024
            total += _kilobytes(Path(f"/proc/{process}/smaps_rollup"), "Pss:") * 1024
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
    return total


def _tree(pid: int) -> list[int]:
    found, waiting = [], [pid]
    while waiting:
        current = waiting.pop()
        found.append(current)
        try:
            for task in Path(f"/proc/{current}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _kilobytes(path: Path, name: str) -> int:
    """A line of a file of /proc; 0 where a process that ended has no such line any more."""
    return next((int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(name)), 0)
