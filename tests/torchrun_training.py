"""Training runs of several processes, one after the other: run by torchrun.

torchrun --nproc-per-node N torchrun_training.py RUNS

RUNS is a JSON list of ``[settings, rank, moment]``: the signal comes to that process, at that moment among
those at which the loop asks; at moment 0 none comes.
"""

import contextlib
import json
import sys
from pathlib import Path

import pytest
from one_process import one_of_a_run
from training_runs import Interrupter

from dpo_opt.optimize import TrainConfig, train
from dpo_opt.schemas.errors import Preempted

if __name__ == "__main__":
    with one_of_a_run() as world:
        for settings, rank, moment in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
            with pytest.MonkeyPatch.context() as monkeypatch:
                Interrupter(monkeypatch, at=moment if world.rank == rank else 0)
                with pytest.raises(Preempted) if moment else contextlib.nullcontext():
                    train(TrainConfig.model_validate(settings))
