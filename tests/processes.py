"""Programs of the tests as processes of one run: by torchrun, or one by one with a launcher's variables."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def torchrun(processes: int, program: str, *arguments: Path, gpus: bool = False) -> None:
    """Run to the end; what it said is shown where it failed."""
    devices = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    address = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    process = subprocess.Popen(
        [*launcher, *address, program, *map(str, arguments)],
        env=os.environ | ONE_THREAD | devices,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, said = process.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        # The launcher's children too: they would wait for each other for half an hour.
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, said[-5000:]


def start(program: Path, *arguments: str, variables: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(program), *arguments],
        env=os.environ | ONE_THREAD | {"CUDA_VISIBLE_DEVICES": ""} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def alive(pid: int) -> bool:
    """Whether a process runs: one that ended and that nobody has waited for does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def until(condition: Callable[[], object], *, seconds: float) -> None:
    """Return when it holds; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Return when it holds; fail where the process ends before."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
