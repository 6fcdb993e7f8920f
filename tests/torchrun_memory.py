"""Training runs of several processes, one of which runs out of memory: run by torchrun.

torchrun --nproc-per-node N torchrun_memory.py RUNS

RUNS is a JSON list of ``[settings, rank, moment, times]``: memory runs out on that process, at these times
among those at which it comes to that moment of training. What process N says goes into ``said-N.json``.
"""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from one_process import one_of_a_run
from torch import Tensor

from dpo_opt.optimize import TrainConfig, evaluation, gradients, micro_batches, train
from dpo_opt.optimize.forward.packing import Batch
from dpo_opt.optimize.pair_results import PairResults
from dpo_opt.optimize.processes.distributed import World
from dpo_opt.optimize.processes.exchanges import Exchanges
from dpo_opt.optimize.processes.fsdp import ShardedPolicy
from dpo_opt.schemas.errors import DpoOptError
from dpo_opt.schemas.progress import Silent


class Listener(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


class Planted:
    """Memory runs out at these times, counted from 1, in the forwards that a module asks for."""

    def __init__(self, patch: pytest.MonkeyPatch, times: list[int], asking: ModuleType) -> None:
        self.times, self.made, self.asked = times, 0, False
        forward_pairs = asking.forward_pairs

        def counted(*given: Any, **named: Any) -> PairResults:
            self.asked = True
            try:
                return forward_pairs(*given, **named)
            finally:
                self.asked = False

        patch.setattr(asking, "forward_pairs", counted)

    def __call__(self, *_: object) -> None:
        self.made += self.asked
        if self.asked and self.made in self.times:
            raise torch.OutOfMemoryError("planted")


def plant(patch: pytest.MonkeyPatch, moment: str, times: list[int]) -> None:
    """Let memory run out at a moment of training, or of an evaluation if ``evaluation, `` stands before it.

    Args:
        patch: Undoes it.
        moment: ``to device``: before a forward. ``forward``, ``backward``: in the second layer. ``between``
            the two. ``before exchange``, ``after exchange``: of any parameters or gradients.
        times: See ``Planted``.
    """
    _, in_evaluation, moment = moment.rpartition("evaluation, ")
    planted = Planted(patch, times, evaluation if in_evaluation else gradients)

    def first(name: str, owner: object) -> None:
        made = getattr(owner, name)
        patch.setattr(owner, name, lambda *given, **named: (planted(), made(*given, **named))[1])

    def then(name: str, owner: object) -> None:
        made = getattr(owner, name)
        patch.setattr(owner, name, lambda *given, **named: (made(*given, **named), planted())[0])

    forward = ShardedPolicy.batch_logps

    def in_second_layer(policy: ShardedPolicy, *given: Any, **named: Any) -> Tensor:
        def look(_module: object, _inputs: object, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if moment == "forward":
                planted()
            elif tensor.requires_grad:
                tensor.register_hook(planted)

        hook = policy.model.base_model.layers[1].register_forward_hook(look)
        try:
            return forward(policy, *given, **named)
        finally:
            hook.remove()

    match moment:
        case "to device":
            first("to", Batch)
        case "between":
            first("measure", micro_batches)
        case "before exchange":
            first("make", Exchanges)
        case "after exchange":
            then("make", Exchanges)
        case _:
            patch.setattr(ShardedPolicy, "batch_logps", in_second_layer)


def main(listed: Path, world: World) -> None:
    said = {}
    for settings, rank, moment, times in json.loads(listed.read_text(encoding="utf-8")):
        listener = Listener()
        with pytest.MonkeyPatch.context() as patch:
            if rank == world.rank:
                plant(patch, moment, times)
            try:
                train(TrainConfig.model_validate(settings), progress=listener)
            except DpoOptError as error:
                listener.say(f"{error} [{error.fix}]")
        said[Path(settings["output_dir"]).name] = listener.lines
    (listed.parent / f"said-{world.rank}.json").write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    with one_of_a_run() as here:
        main(Path(sys.argv[1]), here)
