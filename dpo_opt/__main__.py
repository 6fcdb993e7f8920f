"""Where the program begins and ends: ``dpo-opt``, or ``python -m dpo_opt``."""

import atexit
import os
import sys

from dpo_opt.cli import main


def run() -> None:
    """Run the command line, and leave with its own exit code.

    Threads of torch's process groups and of vLLM live on while the interpreter is taken apart, and may abort
    it there: a scheduler would then see a signal instead of "preempted and saved".
    """
    code = 1

    def leave() -> None:
        if "torch" in sys.modules:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    # The first to be registered is the last to run.
    atexit.register(leave)
    try:
        main(prog_name="dpo-opt")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise


if __name__ == "__main__":
    run()
