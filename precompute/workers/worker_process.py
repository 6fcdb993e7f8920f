"""Runs ``dpo-opt`` in a process that ends when its launcher ends, however that happens.

Run by itself: ``python -P worker_process.py LAUNCHER ARGUMENTS``, where LAUNCHER is a process number. The
process asks the kernel to signal it at the launcher's death before it imports anything of this program.
``preexec_fn`` of ``subprocess.Popen`` would ask even earlier, but it may deadlock in a launcher with threads.
"""

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def command(*arguments: str) -> list[str]:
    """The command that runs ``dpo-opt`` with these arguments, in a process that ends with this one."""
    # -P: never import modules from the folder that a job starts in.
    return [sys.executable, "-P", __file__, str(os.getpid()), *arguments]


def end_with(parent: int) -> None:
    """End this process with SIGTERM when its parent ends, or now if the parent has ended already.

    Where the kernel has no such signal (it is Linux's own), only the second holds.

    Args:
        parent: Number of the process that started this one.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # The kernel does not signal a death that came before the request. An orphan has another parent.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    _, launcher, *arguments = sys.argv
    end_with(int(launcher))
    sys.argv = ["dpo-opt", *arguments]
    runpy.run_module("dpo_opt", run_name="__main__", alter_sys=True)
