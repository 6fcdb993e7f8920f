"""Policies that several processes load by part, and as whole models: run by torchrun.

torchrun --nproc-per-node N torchrun_loading.py CASES

CASES is a JSON list of ``[name, model folder, settings, fault]``; the fault is planted, if it is not empty.
Process N writes what it found into ``loaded-N.json``.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from one_process import one_of_a_run
from torch import Tensor
from torch.distributed.tensor import DTensor

from dpo_opt.optimize import TrainConfig, build_policy
from dpo_opt.optimize.forward import stored_weights
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.forward.stored_weights import StoredWeights
from dpo_opt.optimize.memory.budget import Device
from dpo_opt.optimize.prepare import Prepared
from dpo_opt.optimize.processes.distributed import World, patient_world
from dpo_opt.schemas.errors import DpoOptError
from dpo_opt.schemas.pairs import TokenSequence

PAIR = tuple(
    TokenSequence(np.arange(3, 9, dtype=np.int32), np.arange(first, last, dtype=np.int32))
    for first, last in ((4, 12), (20, 25))
)


class Reads:
    """Bytes in the files of all parts that are read, of the largest part and of the largest tensor."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.parts, self.largest, self.largest_whole = 0, 0, 0
        reading = False
        read, own = StoredWeights.read, build_policy.read_own_parts

        def counted(weights: StoredWeights, name: str, rows: slice | None = None) -> Tensor:
            found = read(weights, name, rows)
            if reading:
                self.parts += found.nbytes
                self.largest = max(self.largest, found.nbytes)
            return found

        def own_parts(*given: Any) -> None:
            nonlocal reading
            reading = True
            own(*given)
            reading = False
            (weights, *_) = given
            self.largest_whole = max(read(weights, place.name).nbytes for place in weights._places)

        patch.setattr(StoredWeights, "read", counted)
        patch.setattr(build_policy, "read_own_parts", own_parts)


def plant(patch: pytest.MonkeyPatch, fault: str) -> None:
    """``whole``: a process reads whole tensors, and keeps its part. ``rows``: it keeps another one's part.
    ``untied``: it makes two parameters of one that has two names. ``as before``: it loads the whole model.
    """
    read = StoredWeights.read

    def read_whole(weights: StoredWeights, name: str, rows: slice | None = None) -> Tensor:
        return read(weights, name) if rows is None else read(weights, name)[rows]

    def read_first(weights: StoredWeights, name: str, rows: slice | None = None) -> Tensor:
        return read(weights, name, rows and slice(0, rows.stop - rows.start))

    def fill_each(weights: StoredWeights, filled: Any) -> None:
        for place in weights._places:
            stored_weights._put([place], filled)

    match fault:
        case "whole":
            patch.setattr(StoredWeights, "read", read_whole)
        case "rows":
            patch.setattr(StoredWeights, "read", read_first)
        case "untied":
            patch.setattr(StoredWeights, "fill", fill_each)
        case "as before":
            patch.setattr(build_policy, "lay_out_policy", lambda *_, **__: "planted")


class Peak:
    """Bytes of main memory that this process took at most while it loaded, beyond what it had."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.taken = 0
        compare = build_policy.require_same_in_compute_dtype

        def compared(policy: Policy, *, where: str) -> None:
            # This is the first forward that gathers parameters. On a CPU its memory is main memory too.
            self.taken = self._field("VmHWM") - before
            compare(policy, where=where)

        patch.setattr(build_policy, "require_same_in_compute_dtype", compared)
        Path("/proc/self/clear_refs").write_text("5")
        before = self._field("VmRSS")

    def _field(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def load(
    model: Path, settings: dict[str, Any], world: World, patient: World
) -> tuple[Policy, list[float], list[str]]:
    config = TrainConfig.model_validate(
        {"shards": "unused", "model": str(model), "output_dir": "unused", **settings}
    )
    shards = SimpleNamespace(manifest=SimpleNamespace(fingerprint=SimpleNamespace(max_length=64)))
    prepared = SimpleNamespace(folder=shards, model_folder=model)
    said: list[str] = []
    policy, cost = build_policy.start(
        config,
        cast(Prepared, prepared),
        None,
        world=world,
        patient=patient,
        device=Device("cpu", None),
        say=said.append,
    )
    return policy, [*cost], said


def facts(policy: Policy) -> dict[str, Any]:
    """All that a loaded policy is, on this process; numbers as bytes."""
    model, probe = policy.model, policy.probe
    assert probe is not None

    def numbers(tensor: Tensor) -> tuple[Any, ...]:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        raw = local.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return str(tensor.dtype), tuple(tensor.shape), tuple(local.shape), local.device.type, raw

    with torch.no_grad():
        logps = torch.cat(policy.sequence_logps([PAIR]))
    return {
        "parameters": {
            name: (*numbers(parameter), parameter.requires_grad)
            for name, parameter in model.named_parameters(remove_duplicate=False)
        },
        "count": len([*model.parameters()]),
        "buffers": {name: numbers(buffer) for name, buffer in model.named_buffers()},
        "state": sorted(model.state_dict()),
        "packs": policy.packs,
        "attention": model.config.get_text_config()._attn_implementation,
        "probe": [*probe[3:], numbers(probe.expected)],
        "logps": numbers(logps),
    }


def main(listed: Path, world: World) -> None:
    found: dict[str, dict[str, Any]] = {}
    patient = patient_world(world)
    for name, model, settings, fault in json.loads(listed.read_text(encoding="utf-8")):
        with pytest.MonkeyPatch.context() as patch:
            reads = Reads(patch)
            plant(patch, fault)
            peak = Peak(patch)
            try:
                policy, cost, said = load(Path(model), settings, world, patient)
            except DpoOptError as error:
                found[name] = {"refused": str(error)}
                continue
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build_policy, "lay_out_policy", lambda *_, **__: "planted")
            whole, whole_cost, _ = load(Path(model), settings, world, patient)
        expected, loaded = facts(whole), facts(policy)
        parameters = dict(policy.model.named_parameters())
        own = {n: p.to_local().numel() for n, p in parameters.items() if isinstance(p, DTensor)}
        found[name] = {
            "differs": [key for key in expected if loaded[key] != expected[key]],
            "same cost": cost == whole_cost,
            "said": said,
            "own": sum(own.values()),
            "own of the files": sum(count for part, count in own.items() if "lora_" not in part),
            "weights of the files": sum(p.numel() for part, p in parameters.items() if "lora_" not in part),
            "largest whole": reads.largest_whole,
            "peak": peak.taken,
            "read": reads.parts,
            "largest": reads.largest,
        }
    (listed.parent / f"loaded-{world.rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    with one_of_a_run() as here:
        main(Path(sys.argv[1]), here)
