"""The budget of several processes, with devices made of arithmetic: run by torchrun.

torchrun --nproc-per-node N torchrun_budget.py MODEL OUTPUT
torchrun_budget.py alone-without-memory     (one process of two, by a launcher's variables)
"""

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from one_process import one_of_a_run
from torch import Tensor
from torchrun_steps import gradients, load, pair_groups, step, write

from dpo_opt.optimize.forward.packing import Batch
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.memory.budget import Room, fit_budget, take_two_micro_batches
from dpo_opt.optimize.processes.distributed import (
    World,
    least_of_ranks,
)
from dpo_opt.optimize.processes.fsdp import ShardedPolicy, shard_policy
from dpo_opt.schemas.errors import ConfigError

MB = 10**6
ROWS = 300


def peaks(tried: list[int], *, per_row: int = MB, too_many: int | None = None) -> Callable[[int], int]:
    """Of packs on one device; ``tried`` gets their sizes, and so many copies do not fit."""

    def peak(copies: int) -> int:
        tried.append(copies)
        if copies == too_many:
            raise torch.OutOfMemoryError
        return per_row * ROWS * copies

    return peak


def uneven(world: World) -> dict[str, object]:
    """Budgets and probes where the last process has less than the others, or runs out of memory alone."""
    last = world.rank == world.size - 1
    facts: dict[str, object] = {"least": least_of_ranks(10 - world.rank, world)}
    for name, free, per_row, too_many in (
        ("smaller device", 3000 * MB if last else 9000 * MB, MB, None),
        ("larger peaks", 9000 * MB, 3 * MB if last else MB, None),
        ("out of memory", 9000 * MB, MB, 4 if last else None),
        ("longest pair too long", 200 * MB if last else 9000 * MB, MB, None),
    ):
        tried: list[int] = []
        peak = peaks(tried, per_row=per_row, too_many=too_many)
        try:
            found: object = fit_budget(peak, rows=ROWS, room=Room(free, 10_000 * MB), world=world)
        except ConfigError as error:
            found = str(error)
        facts[name] = [found, tried]
    return facts


def whole_gradient_bytes(policy: ShardedPolicy) -> int:
    """What this process holds of gradients that are not exchanged yet."""
    held = 0
    for module in (policy.root, *policy.model.modules()):
        if hasattr(module, "_get_fsdp_state"):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                for param in group.fsdp_params:
                    whole = param.unsharded_accumulated_grad
                    if whole is None:
                        whole = getattr(param, "_unsharded_param", torch.empty(0)).grad
                    held += 0 if whole is None else whole.numel() * whole.itemsize
    return held


def gradients_between_micro_batches(policy: Policy) -> list[int]:
    """Bytes of whole gradients when each of a probe's micro-batches begins, and after the last."""
    assert isinstance(policy, ShardedPolicy)
    held: list[int] = []
    forward = ShardedPolicy.batch_logps

    def watched(policy: ShardedPolicy, batch: Batch) -> Tensor:
        held.append(whole_gradient_bytes(policy))
        return forward(policy, batch)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ShardedPolicy, "batch_logps", watched)
        take_two_micro_batches(policy, pair_groups(3))
    return [*held, whole_gradient_bytes(policy)]


def break_off(policy: Policy, world: World) -> int:
    """A budget whose larger probes run out of memory on the last process, in the second backward's middle."""
    backwards, last = 0, world.rank == world.size - 1

    def out_of_memory(_: Tensor) -> None:
        nonlocal backwards
        backwards += 1
        if last and backwards == 2:
            raise torch.OutOfMemoryError

    def attach(_module: object, _inputs: object, output: object) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        assert isinstance(tensor, Tensor)
        tensor.register_hook(out_of_memory)

    def peak(copies: int) -> int:
        layer = policy.model.base_model.layers[0]
        hook = layer.register_forward_hook(attach) if copies == 2 else None
        try:
            take_two_micro_batches(policy, pair_groups(copies))
        finally:
            if hook is not None:
                hook.remove()
        return MB * ROWS * copies

    budget = fit_budget(peak, rows=ROWS, room=Room(9000 * MB, 10_000 * MB), world=world)
    # The last process made what was left of the second one for the others.
    assert backwards == (3 if last else 2)
    for parameter in policy.model.parameters():
        parameter.grad = None
    return budget


def alone_without_memory(world: World) -> None:
    """The last process finds in its first probe that it has no memory; the others have enough."""
    peak = peaks([], too_many=1 if world.rank == world.size - 1 else None)
    fit_budget(peak, rows=ROWS, room=Room(9000 * MB, 10_000 * MB), world=world)


def main(model: Path, output: Path, world: World) -> None:
    facts = uneven(world)
    policy = shard_policy(load(model, world), world)
    facts["gradients"] = gradients_between_micro_batches(policy)
    facts["parameters"] = sum(parameter.numel() for parameter in policy.model.parameters())
    groups, plan = pair_groups(5), [[0, 1, 2], [3, 4]]
    for name in ("as it is", "after a probe that was broken off"):
        policy = shard_policy(load(model, world), world)
        if name != "as it is":
            facts["broken off"] = break_off(policy, world)
        results = step(policy, groups, world, plan)
        write(output / name, {"results": results, **gradients(policy, world)}, world)
    (output / f"facts-{world.rank}.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    with one_of_a_run(timeout=timedelta(seconds=60)) as here:
        if sys.argv[1] == "alone-without-memory":
            alone_without_memory(here)
        else:
            main(Path(sys.argv[1]), Path(sys.argv[2]), here)
