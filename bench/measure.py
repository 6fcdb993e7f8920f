"""What a command took: seconds, and peak memory of its processes together."""

import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


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
    peak = 0
    while watch.is_alive():
        peak = max(peak, _tree_bytes(process.pid))
        watch.join(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:4])} ... ended with {process.returncode}")
    return Measured(time.perf_counter() - began, peak / 1e9, output[0])


def _tree_bytes(pid: int) -> int:
    total, waiting = 0, [pid]
    while waiting:
        current = waiting.pop()
        try:
            total += _proportional_bytes(Path(f"/proc/{current}/smaps_rollup").read_text())
            for task in Path(f"/proc/{current}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
    return total


def _proportional_bytes(smaps: str) -> int:
    (kilobytes,) = (line.split()[1] for line in smaps.splitlines() if line.startswith("Pss:"))
    return int(kilobytes) * 1024
