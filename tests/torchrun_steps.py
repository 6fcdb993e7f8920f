"""One optimizer step as the training loop makes it, on however many processes: run by torchrun, or imported.

torchrun --nproc-per-node N torchrun_steps.py MODELS OUTPUT [STATE_TO_LOAD]
"""

import errno
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from one_process import one_of_a_run
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dpo_opt.optimize.checkpoint import state_files
from dpo_opt.optimize.checkpoint.state_files import load_state, own_files, save_state
from dpo_opt.optimize.forward.balance import balance, forward_cost
from dpo_opt.optimize.forward.load_policy import load_policy
from dpo_opt.optimize.forward.packing import Group
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.processes.distributed import (
    World,
    any_rank,
    clip_gradients,
    from_all,
    from_first,
    patient_world,
    sum_over_ranks,
    text_from_first,
    wait_for_all,
)
from dpo_opt.optimize.processes.fsdp import (
    ShardedPolicy,
    announce_micro_batch,
    gather_policy,
    gather_tensors,
    join_empty,
    shard_policy,
)
from dpo_opt.schemas.errors import DpoOptError
from dpo_opt.schemas.pairs import TokenSequence

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU, None)


def pair_groups(count: int) -> list[Group]:
    """Pairs of uneven lengths, some with common first words."""
    rng = np.random.default_rng(count)
    groups: list[Group] = []
    for _ in range(count):
        prompt, common, chosen, rejected = (
            rng.integers(2, 260, size=rng.integers(low, high), dtype=np.int32)
            for low, high in ((1, 12), (0, 4), (1, 16), (1, 9))
        )
        groups.append(
            (
                TokenSequence(prompt, np.concatenate([common, chosen])),
                TokenSequence(prompt, np.concatenate([common, rejected])),
            )
        )
    return groups


def load(folder: Path, world: World, *, dtype: torch.dtype = torch.float32) -> Policy:
    return load_policy(folder, dtype=dtype, device=CPU, trainable=True)


def step(policy: Policy, groups: Sequence[Group], world: World, plan: list[list[int]]) -> Tensor:
    """Gradients of a step's loss; (pairs, 3) loss, chosen and rejected log-probs, on every process."""
    results = torch.zeros(len(groups), 3, dtype=torch.float64, device=policy.device)
    for number, chosen in enumerate(plan):
        announce_micro_batch(policy, last=number == len(plan) - 1)
        if not chosen:
            join_empty(policy, backward=torch.is_grad_enabled())
            continue
        logps = policy.sequence_logps([groups[i] for i in chosen])
        sums = torch.stack([part.double().sum() for part in logps])
        losses = -F.logsigmoid(0.1 * (sums[0::2] - sums[1::2]))
        if torch.is_grad_enabled():
            torch.autograd.backward(losses.sum() / len(groups))
        results[chosen] = torch.stack([losses, sums[0::2], sums[1::2]], dim=1).detach()
    return sum_over_ranks(results, world)


def freeze_all_but(policy: Policy, part: str) -> None:
    for name, parameter in policy.model.named_parameters():
        parameter.requires_grad_(part in name)


def gradients(policy: Policy, world: World) -> dict[str, Tensor]:
    named = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    return gather_tensors(named, world)


def optimizer_state(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, moments and counts of steps, by name."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in policy.model.named_parameters():
        tensors[name] = parameter
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
    return tensors


def odd_tensors(world: World) -> dict[str, Tensor]:
    """What weights and moments are not: fewer rows than processes, no dimensions, other dtypes."""
    rows = {
        "two rows": torch.arange(6.0).view(2, 3),
        "one row": torch.tensor([2**-30], dtype=torch.float64),
        "halves": torch.arange(50).view(10, 5).to(torch.bfloat16),
        "codes": torch.arange(40, dtype=torch.uint8),
    }
    whole = {"count": torch.tensor(2**40 + 1), "alone": torch.tensor([1.5])}
    rows, whole = ({n: t.to(world.device) for n, t in tensors.items()} for tensors in (rows, whole))
    if world.size > 1:
        mesh = init_device_mesh(world.device.type, (world.size,))
        rows = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in rows.items()}
    return rows | whole


def take_steps(models: Path, output: Path, world: World, load_from: Path | None) -> None:
    """All that the tests compare between numbers of processes, into ``output``."""
    plans: dict[str, list[list[list[int]]]] = {}
    norms: dict[str, float] = {}
    for model in ("untied", "tied"):
        for count, budget in ((9, 60), (3, 8), (1, 60)):
            whole, groups = load(models / model, world), pair_groups(count)
            plan = balance(whole, groups, budget=budget, cost=forward_cost(whole), ranks=world.size)
            plans[f"{model}-{count}"] = plan
            policy = shard_policy(whole, world)
            if isinstance(policy, ShardedPolicy):
                assert policy.reduces_once
                # As where whole gradients would not fit beside the rest.
                policy = replace(policy, reduces_once=count != 3)
            with torch.no_grad():
                before = step(policy, groups, world, plan[world.rank])
            spread = [isinstance(parameter, DTensor) for parameter in policy.model.parameters()]
            assert all(spread) if world.size > 1 else not any(spread)
            results = step(policy, groups, world, plan[world.rank])
            assert torch.equal(before, results)
            write(output / f"{model}-{count}", {"results": results, **gradients(policy, world)}, world)
            if count != 9:
                continue
            optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-2, fused=True)
            norms[model] = float(clip_gradients(policy.model.parameters(), 0.05))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            write(
                output / f"{model}-second", {"results": step(policy, groups, world, plan[world.rank])}, world
            )
            keep_state(output, model, policy, optimizer, world, load_from)

    groups = pair_groups(5)
    for name, dtype, trained in (("frozen", torch.float32, "q_proj"), ("bf16", torch.bfloat16, "")):
        whole = load(models / "untied", world, dtype=dtype)
        freeze_all_but(whole, trained)
        plan = balance(whole, groups, budget=60, cost=forward_cost(whole), ranks=world.size)
        policy = shard_policy(whole, world)
        results = step(policy, groups, world, plan[world.rank])
        write(output / name, {"results": results, **gradients(policy, world)}, world)

    facts = {
        "own disks": save_on_own_disks(output, world),
        "plans": plans,
        "norms": norms,
        "no flag": any_rank(False, world),
        "last rank's flag": any_rank(world.rank == world.size - 1, world),
        "failed": failed_on_the_last(world),
        "number": from_first(7 + world.rank, world),
        "text": text_from_first(f"ö{world.rank}", world),
    }
    wait_for_all(world)
    (output / f"facts-{world.rank}.json").write_text(json.dumps(facts), encoding="utf-8")


def keep_state(
    output: Path,
    model: str,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    world: World,
    load_from: Path | None,
) -> None:
    state = optimizer_state(policy, optimizer) | odd_tensors(world)
    save_state(output / f"{model}-state", own_files(state, world), world)
    write(output / f"{model}-held", gather_tensors(state, world), world)
    saved = gather_policy(policy, world)
    if saved is not None:
        saved.model.save_pretrained(output / f"{model}-final")
    if load_from is not None:
        # Other numbers than those that were saved, so that loading must do it.
        with torch.no_grad():
            for tensor in state.values():
                tensor.add_(1)
        load_state(load_from / f"{model}-state", state, world)
        write(output / f"{model}-loaded", gather_tensors(state, world), world)


def save_on_own_disks(output: Path, world: World) -> str:
    """What is said where the processes' folder of one name is not one folder."""
    state_files._SEEN_WITHIN_SECONDS = 0
    try:
        save_state(output / f"disk-{world.rank}", own_files(odd_tensors(world), world), world)
    except DpoOptError as error:
        return str(error)
    return ""


def failed_on_the_last(world: World) -> list[str]:
    """What each process hears where one has no room on its disk, and what all get where none fails."""
    heard = []
    for failing in (world.size - 1, -1):

        def work(failing: int = failing) -> int:
            if world.rank == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            return world.rank

        try:
            heard.append(str(from_all(work, patient_world(world))))
        except OSError as error:
            heard.append(str(error))
    return heard


def write(path: Path, tensors: dict[str, Tensor], world: World) -> None:
    if world.first:
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            path.with_suffix(".safetensors"),
        )


if __name__ == "__main__":
    with one_of_a_run() as here:
        take_steps(Path(sys.argv[1]), Path(sys.argv[2]), here, Path(sys.argv[3]) if sys.argv[3:] else None)
