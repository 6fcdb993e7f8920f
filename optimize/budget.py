"""How many token rows a micro-batch takes where nobody said so: a matter of speed and memory alone.

On a GPU the memory decides, and is measured with the longest pair before the first step. On a CPU it does not
matter: rows beyond a few hundred make a step no faster, only larger.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from dpo_opt.optimize.packing import Group, packed_size, pair_group
from dpo_opt.optimize.policy import Policy
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.manifest import ShardFolder
from dpo_opt.schemas.pairs import ScoredPair

CPU_ROWS = 512
"""Steps of 1024 and 4096 rows take as long on a CPU, and 1.2 and 1.9 times the memory."""
MOST_ROWS = 16384
"""Matrix products are at full speed well below this."""
# Packs differ in how many rows are scored and attended to, and the allocator needs room to move.
_FILL = 0.85
# Smaller packs measure the constant part of the memory, not what a row takes.
_PROBE_ROWS = 2048


class Room(NamedTuple):
    """Bytes on the device."""

    free: int
    """For activations, once gradients and optimizer state are there."""
    total: int


def longest_pair(folder: ShardFolder) -> ScoredPair:
    """The pair with the most tokens, which every budget must hold.

    Raises:
        DataError: The index or the shard is damaged.
    """
    columns = ["prompt_length", "chosen_length", "rejected_length", "shard", "row_group", "row"]
    index = folder.index(columns)
    lengths = sum(index[name].to_numpy().astype("int64") for name in columns[:3])
    place = int(lengths.argmax())
    shard, row_group, row = (index[name][place].as_py() for name in columns[3:])
    (pairs,) = folder.row_groups(shard, row_groups=[row_group])
    return next(pair for pair in pairs if pair.row == row)


def least_budget(longest: ScoredPair, device: torch.device) -> int:
    """What ``choose_budget`` gives for a model that packs: on a CPU exactly, on a GPU at least."""
    rows = packed_size(pair_group(longest))
    return rows if device.type == "cuda" else max(CPU_ROWS, rows)


def choose_budget(policy: Policy, longest: Group, *, optimizer_bytes: int = 0) -> int:
    """Most token rows per forward and backward, for this model on this device.

    On a CPU it follows from the longest pair; on a GPU packs of it go forward and backward, so it depends on
    what else is there: keep it with the run. With several processes each must take the least of all.

    Args:
        policy: Ready to train, checkpointing and sharding included. Its gradients are None before and after.
        longest: The longest pair that will be trained on.
        optimizer_bytes: What the optimizer is still going to allocate (``memory.optimizer_bytes``).

    Raises:
        ConfigError: Not even the longest pair alone fits.
    """
    rows = _fed_rows(longest, packs=policy.packs)
    if policy.device.type != "cuda":
        return max(CPU_ROWS, rows)
    parameters = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]

    def peak(copies: int) -> int:
        before = torch.cuda.memory_allocated(policy.device)
        torch.cuda.reset_peak_memory_stats(policy.device)
        logps = policy.batch_logps(policy.layout([longest] * copies).to(policy.device))
        torch.autograd.backward(logps.sum())
        return torch.cuda.max_memory_allocated(policy.device) - before

    try:
        # Gradients are there from here on, as in every micro-batch of a step but the first.
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(policy.device)
        return fit_budget(peak, rows=rows, room=Room(free - optimizer_bytes, total))
    except torch.OutOfMemoryError as error:
        raise _too_small(rows, missing=None, total=torch.cuda.mem_get_info(policy.device)[1]) from error
    finally:
        for parameter in parameters:
            parameter.grad = None
        torch.cuda.empty_cache()


def fit_budget(peak: Callable[[int], int], *, rows: int, room: Room) -> int:
    """The budget that fills ``room``, from the peaks of two packs of different size.

    Args:
        peak: Bytes that a pack of so many copies of the longest pair takes beyond what is always there;
            raises ``torch.OutOfMemoryError`` where it does not fit.
        rows: Rows of one copy.
        room: What there is.

    Raises:
        ConfigError: One copy does not fit.
    """
    copies = max(1, math.ceil(_PROBE_ROWS / rows))
    small, large = None, None
    while large is None:
        try:
            small = peak(copies)
            large = peak(2 * copies)
        except torch.OutOfMemoryError:
            if copies == 1:
                break
            copies //= 2
            torch.cuda.empty_cache()
    if small is None:
        raise _too_small(rows, missing=None, total=room.total)
    usable = int(_FILL * room.free)
    # Where two do not fit, all of it counts as growing with the rows.
    per_row = small / (copies * rows) if large is None else max(1, large - small) / (copies * rows)
    constant = max(0, small - per_row * copies * rows)
    budget = int((usable - constant) / per_row)
    if budget < rows:
        # The longest pair is all there is of its kind: it may use what is otherwise kept free.
        needed = int(constant + per_row * rows)
        if needed > room.free:
            raise _too_small(rows, missing=needed - room.free, total=room.total)
    return max(rows, min(budget, MOST_ROWS))


def _fed_rows(group: Group, *, packs: bool) -> int:
    """Rows that a group alone takes in a packed, or else in a padded batch."""
    if packs:
        return packed_size(group)
    return len(group) * max(len(s.prompt_ids) + len(s.completion_ids) - 1 for s in group)


def _too_small(rows: int, *, missing: int | None, total: int) -> ConfigError:
    lacking = "" if missing is None else f": {missing / 1e9:.1f} GB are missing"
    return ConfigError(
        f"the longest pair ({rows} token rows) does not fit on the device of {total / 1e9:.1f} GB{lacking}",
        why="every pair goes forward and backward at once",
        fix="add --activation-checkpointing full, or make shards of shorter pairs with "
        "`dpo-opt precompute --max-length`",
    )
