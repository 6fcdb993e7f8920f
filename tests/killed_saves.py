"""Training runs that are killed inside their second save, each at another moment.

killed_saves.py SETTINGS FOLDER     (SETTINGS: JSON; the runs go to FOLDER/MOMENT)
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_opt.optimize import TrainConfig, begin, train
from dpo_opt.optimize.checkpoint import checkpoints, export, saving, state_files

MOMENTS: dict[str, tuple[object, str]] = {
    "copying": (saving.Snapshot, "copied"),
    "the policy": (export, "write_tensors"),
    "the optimizer": (state_files, "write_tensors"),
    "the last files": (checkpoints, "_complete"),
    "the name": (Path, "replace"),
    "older ones": (begin, "prune_checkpoints"),
}


def kill_in_second_save(function: Callable[..., Any]) -> Callable[..., Any]:
    saves = 0

    def run_or_die(*args: Any, **kwargs: Any) -> Any:
        nonlocal saves
        if function.__name__ != "replace" or args[0].name.startswith(".step-"):
            saves += 1
        if saves == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return run_or_die


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    for moment, (place, name) in MOMENTS.items():
        # Importing took all the time.
        child = os.fork()
        if not child:
            setattr(place, name, kill_in_second_save(getattr(place, name)))
            train(TrainConfig(**settings, output_dir=Path(sys.argv[2], moment)))
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, moment
