"""Training runs of several processes, one after the other: run by torchrun.

torchrun --nproc-per-node N torchrun_training.py RUNS

RUNS is a JSON list of ``[settings, rank, moment]``: the signal comes to that process, at that moment among
those at which the loop asks; at moment 0 none comes.
"""

import contextlib
import json
import sys
from os import environ
from pathlib import Path

import pytest
import torch
from processes import leave
from training_runs import Interrupter

from dpo_opt.optimize import TrainConfig, train
from dpo_opt.optimize.processes.distributed import process_group, world_from_environment
from dpo_opt.schemas.errors import Preempted

if __name__ == "__main__":
    torch.set_num_threads(1)
    world = world_from_environment(environ)
    with process_group(world):
        for settings, rank, moment in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
            with pytest.MonkeyPatch.context() as monkeypatch:
                Interrupter(monkeypatch, at=moment if world.rank == rank else 0)
                with pytest.raises(Preempted) if moment else contextlib.nullcontext():
                    train(TrainConfig.model_validate(settings))
    leave()
