"""A worker's process ends with its launcher."""

import os
import signal
import subprocess
import sys

from processes import alive, until

from dpo_opt import __version__
from dpo_opt.precompute.workers import worker_process

FILE = str(worker_process.__file__)
CHILD = f"""
import os, runpy, time
runpy.run_path({FILE!r})["end_with"](os.getppid())
print(os.getpid(), flush=True)
time.sleep(60)
"""
PARENT = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {CHILD!r}])
"""


def test_it_runs_the_program_with_its_arguments_and_its_exit_code() -> None:
    command = [sys.executable, "-P", FILE, str(os.getpid())]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert __version__ in done.stdout
    assert subprocess.run([*command, "nonsense"], capture_output=True, check=False).returncode == 2


def test_one_whose_launcher_is_gone_before_it_starts_does_not_run() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    command = [sys.executable, "-P", FILE, str(gone.pid), "--version"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, b"")


def test_one_whose_launcher_is_killed_ends() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until(lambda: not alive(child), seconds=5)
