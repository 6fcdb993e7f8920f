"""Chooses the micro-batch size in token rows if --micro-batch-tokens is not given (speed and memory only).

On a GPU the free memory decides: it is measured with the longest pair before the first step. On a CPU more
than a few hundred rows make a step no faster and only take memory.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from dpo_opt.optimize.forward.packing import Group, packed_size, pair_group
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.processes.distributed import World, any_rank, least_of_ranks
from dpo_opt.optimize.processes.fsdp import (
    ShardedPolicy,
    announce_micro_batch,
    finish_broken_off,
    join_empty,
)
from dpo_opt.schemas.arrow_numbers import numbers
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.pairs import ScoredPair
from dpo_opt.schemas.shard_folder import ShardFolder

CPU_ROWS = 512
"""Steps of 1024 and 4096 rows take as long on a CPU, and 1.2 and 1.9 times the memory."""
MOST_ROWS = 16384
"""Matrix products are at full speed well below this."""
# Share of the free memory to fill: packs differ in scored rows and attention, and the allocator needs slack.
_FILL = 0.85
# Packs with fewer rows measure the constant part of the memory, not what a row takes.
_PROBE_ROWS = 2048


class Room(NamedTuple):
    """Memory of the device, in bytes."""

    free: int
    """Free for activations, once gradients and optimizer state are allocated."""
    total: int


class Device(NamedTuple):
    """The kind of device that a run uses."""

    type: str
    """torch's name for it, such as ``cuda``."""
    memory: int | None
    """Bytes of the smallest of the processes' GPUs; None on a CPU."""

    def __str__(self) -> str:
        return self.type if self.memory is None else f"{self.type} of {self.memory / 1e9:.1f} GB"

    def holds_as_much(self, other: "Device") -> bool:
        """Whether a budget that was measured on one device also fits the other."""
        if self.memory is None or other.memory is None:
            return self == other
        # Drivers reserve different amounts on the same card; ``_FILL`` leaves far more.
        return self.type == other.type and abs(self.memory - other.memory) < 0.01 * self.memory


def run_device(world: World) -> Device:
    """The device of the run, the same on every process."""
    if world.device.type != "cuda":
        return Device(world.device.type, None)
    return Device("cuda", least_of_ranks(torch.cuda.mem_get_info(world.device)[1], world))


def longest_pair(folder: ShardFolder) -> ScoredPair:
    """The pair with the most tokens, which every budget must hold.

    Raises:
        DataError: The index or the shard is damaged.
    """
    columns = ["prompt_length", "chosen_length", "rejected_length", "shard", "row_group", "row"]
    index = folder.index(columns)
    lengths = [numbers(index[name]).astype("int64") for name in columns[:3]]
    place = int(np.sum(lengths, axis=0).argmax())
    shard, row_group, row = (index[name][place].as_py() for name in columns[3:])
    (pairs,) = folder.row_groups(shard, row_groups=[row_group])
    return next(pair for pair in pairs if pair.row == row)


def least_budget(longest: ScoredPair, device: torch.device) -> int:
    """The result of ``choose_budget`` for a model that packs; on a GPU, the least that it can be."""
    rows = packed_size(pair_group(longest))
    return rows if device.type == "cuda" else max(CPU_ROWS, rows)


def choose_budget(
    policy: Policy, longest: Group, *, optimizer_bytes: int = 0, world: World | None = None
) -> int:
    """Most token rows per forward and backward, for this model on these devices.

    On a CPU the longest pair decides. On a GPU copies of that pair run forward and backward, so the result
    depends on what else is in memory: keep it with the run. Several processes measure together and all get
    the smallest result.

    Args:
        policy: Ready to train, with checkpointing and sharding. Its gradients are None before and after.
        longest: The longest pair that will be trained on.
        optimizer_bytes: Bytes that the optimizer will still allocate (``optimizer.optimizer_bytes``).
        world: The run's processes; None: a single process.

    Raises:
        ConfigError: Not even the longest pair alone fits on one of the devices.
    """
    rows = policy.rows(longest)
    if policy.device.type != "cuda":
        return max(CPU_ROWS, rows)
    world = world or World(0, 1, 0, policy.device, None)
    parameters = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]

    def peak(copies: int) -> int:
        before = torch.cuda.memory_allocated(policy.device)
        torch.cuda.reset_peak_memory_stats(policy.device)
        take_two_micro_batches(policy, [longest] * copies)
        return torch.cuda.max_memory_allocated(policy.device) - before

    try:
        # Gradients exist from here on, as in every micro-batch of a step except the first.
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(policy.device)
        return fit_budget(peak, rows=rows, room=Room(free - optimizer_bytes, total), world=world)
    except torch.OutOfMemoryError as error:
        raise _too_small(rows, missing=None, total=torch.cuda.mem_get_info(policy.device)[1]) from error
    finally:
        for parameter in parameters:
            parameter.grad = None
        torch.cuda.empty_cache()


def take_two_micro_batches(policy: Policy, groups: list[Group]) -> None:
    """Run one pack forward and backward twice, as the first and the last micro-batch of a step.

    Several processes may keep unsharded gradients until the last micro-batch, which exchanges them. So a
    single micro-batch would take less memory than a step.

    Args:
        policy: Gradients are added to its parameters' gradients.
        groups: The groups to pack; an empty list means the smallest possible micro-batch.

    Raises:
        torch.OutOfMemoryError: The pack does not fit on this process. If there are others, they do not know
            it: this one first took part in all that they exchange.
    """
    ran_out = False
    for last in (False, True):
        announce_micro_batch(policy, last=last)
        if not groups or ran_out:
            join_empty(policy, backward=True)
            continue
        try:
            logps = policy.batch_logps(policy.layout(groups).to(policy.device))
            torch.autograd.backward(logps.sum())
            continue
        except torch.OutOfMemoryError:
            if not isinstance(policy, ShardedPolicy):
                raise
        # Not in the handler: there the error still holds the tensors of the micro-batch.
        ran_out = True
        finish_broken_off(policy, backward=True)
    if ran_out:
        raise torch.OutOfMemoryError


def fit_budget(peak: Callable[[int], int], *, rows: int, room: Room, world: World) -> int:
    """The budget that fills ``room`` on every process, from the peak memory of packs of growing size.

    A pack twice as large is tried only if the peaks so far predict that it fits on all devices.

    Args:
        peak: Called with a number of copies of the longest pair, 0 included. Returns the bytes that their
            pack takes beyond what is always allocated, or raises ``torch.OutOfMemoryError``. Every process
            calls it equally often, with the same numbers.
        rows: Rows of one copy.
        room: Memory of this process's device.
        world: The run's processes.

    Returns:
        Token rows; the same number on every process.

    Raises:
        ConfigError: One copy does not fit on one of the processes' devices; on every process.
        torch.OutOfMemoryError: Not even the smallest pack fits on this process.
    """
    usable = int(_FILL * room.free)
    small, first = peak(0), _peak_where_all_fit(peak, 1, world)
    if first is None:
        raise _too_small(rows, missing=None, total=room.total)
    large, copies, before = first, 1, 0
    most = MOST_ROWS
    while copies * rows < 2 * _PROBE_ROWS:
        needed = large + copies * (large - small) / (copies - before)
        if any_rank(needed > usable, world):
            break
        larger = _peak_where_all_fit(peak, 2 * copies, world)
        if larger is None:
            # The peaks do not grow linearly here: use no more rows than were seen to fit.
            most = min(most, copies * rows)
            break
        small, large, copies, before = large, larger, 2 * copies, copies
    per_row = max(1, large - small) / ((copies - before) * rows)
    constant = max(0, large - per_row * copies * rows)
    budget = least_of_ranks(int((usable - constant) / per_row), world)
    # A pack of only the longest pair was measured exactly, so it may use the slack too.
    missing = -least_of_ranks(room.free - int(constant + per_row * rows), world)
    if budget < rows and missing > 0:
        raise _too_small(rows, missing=missing, total=room.total)
    return max(rows, min(budget, most))


def _peak_where_all_fit(peak: Callable[[int], int], copies: int, world: World) -> int | None:
    """This process's peak; None on every process if the pack did not fit on one of them."""
    found: int | None
    try:
        found = peak(copies)
    except torch.OutOfMemoryError:
        found = None
    if not any_rank(found is None, world):
        return found
    torch.cuda.empty_cache()
    return None


def _too_small(rows: int, *, missing: int | None, total: int) -> ConfigError:
    lacking = "" if missing is None else f": {missing / 1e9:.1f} GB are missing"
    return ConfigError(
        f"the longest pair ({rows} token rows) does not fit on the device of {total / 1e9:.1f} GB{lacking}",
        why="both completions of a pair run forward and backward together",
        fix="add --activation-checkpointing full, or score shorter pairs into another folder with "
        "`dpo-opt precompute --max-length`",
    )
