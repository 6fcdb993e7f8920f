"""The processes of one training run: which one this is, how they meet, and the few numbers they exchange.

A single process has no process group, and every exchange returns its argument. Under torchrun or srun, each
process drives one GPU with nccl; on a CPU the processes use gloo.
"""

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dpo_opt.schemas.errors import ConfigError, DpoOptError, first_line

T = TypeVar("T")

# Processes may be minutes apart when a run begins: each reads the model.
_TIMEOUT = timedelta(minutes=30)
# Longer than any disk takes to write or hash a checkpoint.
_PATIENCE = timedelta(days=7)
# Ports below those that the operating system assigns to other connections.
_FIRST_PORT, _PORTS = 10_000, 20_000
_GO_ON = "read the other processes' messages, then run the same command with --resume"


class World(NamedTuple):
    """The processes of the run, seen from one of them."""

    rank: int
    size: int
    local_rank: int
    """This process's number on its machine, from 0."""
    device: torch.device
    meeting_point: str | None
    """Address at which torch finds the other processes; None for a single process."""
    group: dist.ProcessGroup | None = None
    """The group that exchanges numbers; None: torch's default one."""

    @property
    def first(self) -> bool:
        """Whether this is the process that writes the run's files and prints messages."""
        return self.rank == 0


def world_from_environment(environment: Mapping[str, str]) -> World:
    """This process's place, as torchrun (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``) or srun gives it.

    Slurm sets variables in a batch script too; only those of a step that srun started count. Without any of
    them, this is the only process.

    Raises:
        ConfigError: A variable is missing or not a number, or the machine has fewer GPUs than processes.
    """
    try:
        if "RANK" in environment and "WORLD_SIZE" in environment:
            rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
            local_rank, meeting_point = int(environment.get("LOCAL_RANK", "0")), "env://"
        elif "SLURM_STEP_NUM_TASKS" in environment:
            rank, size = int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"])
            local_rank, meeting_point = int(environment["SLURM_LOCALID"]), _slurm_meeting_point(environment)
        else:
            rank, size, local_rank, meeting_point = 0, 1, 0, "env://"
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"the launcher's variables cannot be read ({first_line(error)})",
            why="the process does not know its place among the others",
            fix="start with torchrun --nproc-per-node GPUS -m dpo_opt train ..., or srun dpo-opt train ...",
        ) from error
    if size == 1:
        return World(0, 1, 0, _own_device(0), None)
    return World(rank, size, local_rank, _own_device(local_rank), meeting_point)


def _own_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    devices = torch.cuda.device_count()
    # A scheduler that binds GPUs to tasks shows each process only its own GPU.
    if devices > 1 and local_rank >= devices:
        raise ConfigError(
            f"process {local_rank} of this machine has no GPU: {devices} are visible",
            why="two processes on one GPU would take each other's memory",
            fix=f"start only {devices} processes on each machine",
        )
    return torch.device("cuda", local_rank % devices)


def _slurm_meeting_point(environment: Mapping[str, str]) -> str:
    """Address of the process of rank 0, the same on every process of a step."""
    job, step = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID", "0"))
    port = environment.get("MASTER_PORT", str(_FIRST_PORT + (job + 101 * step) % _PORTS))
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
    # The address that srun was called from comes last: it may be a login node.
    address = environment.get("MASTER_ADDR") or first_host(nodes) or environment["SLURM_LAUNCH_NODE_IPADDR"]
    return f"tcp://{address}:{port}"


def first_host(nodes: str) -> str:
    """First name in Slurm's short form of a list of hosts: ``gpu[003-005,9],cpu1`` is ``gpu003``."""
    # Brackets may hold commas; a comma outside of brackets ends the first name.
    name = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", name[0]) if name else ""


@contextlib.contextmanager
def process_group(world: World, *, timeout: timedelta = _TIMEOUT) -> Iterator[None]:
    """Connect the processes while the block runs. A single or already connected process is left as it is.

    Args:
        world: This process and its place among the others.
        timeout: How long a process waits for the others before it gives up.

    Raises:
        DpoOptError: The processes do not find each other, or one ended while others waited for it.
    """
    if world.size == 1 or dist.is_initialized():
        yield
        return
    on_gpu = world.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(world.device)
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=world.meeting_point,
            rank=world.rank,
            world_size=world.size,
            timeout=timeout,
            device_id=world.device if on_gpu else None,
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        where = world.meeting_point
        if where == "env://":
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise DpoOptError(
            f"the {world.size} processes of the run did not find each other ({_reason(error)})",
            where=f"process {world.rank}, {where}",
            why="each process holds a part of the model",
            fix="set MASTER_ADDR and MASTER_PORT to an address and a free port that every machine can reach",
        ) from error
    try:
        yield
    except RuntimeError as error:
        if not _lost_another(error):
            raise
        raise DpoOptError(
            f"another process of the run ended, or the network between them failed ({_reason(error)})",
            where=f"process {world.rank} of {world.size}",
            why="each process holds a part of the model, so none can continue alone",
            fix=_GO_ON,
        ) from error
    finally:
        dist.destroy_process_group()


def patient_world(world: World) -> World:
    """The same processes, for exchanges in which some wait for another one's disk. All must call this.

    The exchanges go over gloo: nccl ends a run in which a process waits for longer than the time limit. They
    may be made in another thread than those of ``world``.
    """
    if world.size == 1:
        return world
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(group, dist.ProcessGroup), "every process belongs to it"
    return world._replace(device=torch.device("cpu"), group=group)


def _lost_another(error: RuntimeError) -> bool:
    # gloo raises bare RuntimeErrors, which name its source file.
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _reason(error: Exception) -> str:
    """The error's first sentence, without the place in the library's source."""
    return re.sub(r"^\[\S*\] ", "", first_line(error)).partition(". ")[0]


def any_rank(flag: bool, world: World) -> bool:
    """Whether the flag is set on any process. All get the same answer, so all stop at the same step."""
    if world.size == 1:
        return flag
    found = torch.tensor(int(flag), device=world.device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=world.group)
    return bool(found)


def sum_over_ranks(values: Tensor, world: World) -> Tensor:
    """Sum of the processes' tensors, in place and on every process.

    Per-pair results are collected with it: each process fills its own pairs' rows of a tensor of zeros.
    """
    if world.size > 1:
        dist.all_reduce(values, group=world.group)
    return values


def from_first(value: int, world: World) -> int:
    """The first process's number, on every process."""
    if world.size == 1:
        return value
    sent = torch.tensor(value, device=world.device)
    dist.broadcast(sent, src=0, group=world.group)
    return int(sent)


def least_of_ranks(value: int, world: World) -> int:
    """The least of the processes' numbers, on every process."""
    if world.size == 1:
        return value
    found = torch.tensor(value, device=world.device)
    dist.all_reduce(found, op=dist.ReduceOp.MIN, group=world.group)
    return int(found)


def process_without(result: object, world: World) -> int | None:
    """The last process that has no result because its memory ran out; the same on every process.

    Args:
        result: This process's; None if its memory ran out.
        world: The run's processes. Every one of them must call this.
    """
    last = -least_of_ranks(-world.rank if result is None else 1, world)
    return None if last < 0 else last


def text_from_first(text: str, world: World) -> str:
    """The first process's text, for example a temporary path, on every process."""
    if world.size == 1:
        return text
    size = from_first(len(text.encode()), world)
    sent = torch.zeros(size, dtype=torch.uint8, device=world.device)
    if world.first:
        sent.copy_(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8))
    dist.broadcast(sent, src=0, group=world.group)
    return bytes(sent.tolist()).decode()


def wait_for_all(world: World) -> None:
    """Return when every process has called this."""
    if world.size > 1:
        devices = [world.device.index] if world.device.type == "cuda" else None
        dist.barrier(group=world.group, device_ids=devices)


def from_all(work: Callable[[], T], world: World) -> list[T]:
    """Do one piece of work on every process; return when all have done theirs.

    Args:
        work: This process's piece. Its result is small, and can be pickled.
        world: From ``patient_world``.

    Returns:
        The results by process.

    Raises:
        Exception: The error of the first process that failed, on all of them.
    """
    if world.size == 1:
        return [work()]
    own: tuple[T | None, Exception | None]
    try:
        own = work(), None
    # Of any class: the others wait for this process, and must hear of its failure. It is raised below.
    except Exception as error:
        # Not every library's error can be pickled.
        known = isinstance(error, DpoOptError | OSError)
        own = None, error if known else DpoOptError(first_line(error, named=True))
    found: list[tuple[T | None, Exception | None]] = [own] * world.size
    dist.all_gather_object(found, own, group=world.group)
    for _, failure in found:
        if failure is not None:
            raise failure
    return [result for result, _ in found]  # type: ignore[misc]


def from_first_alone(work: Callable[[], T], world: World) -> T:
    """Do one piece of work on the first process, while the others wait; its result on all of them.

    Args:
        work: Its result is small, and can be pickled.
        world: From ``patient_world``.

    Raises:
        Exception: The first process's error, on all of them.
    """
    found = from_all(lambda: work() if world.first else None, world)[0]
    return found  # type: ignore[return-value]


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients down to a norm over all parameters and all processes.

    Args:
        parameters: Parameters without a gradient are skipped.
        max_norm: 0 and infinity leave the gradients as they are.

    Returns:
        () the norm before scaling.
    """
    parameters = list(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        # The norm is still split over the processes; this sums it.
        norm = norm.full_tensor()
    if 0 < max_norm < math.inf:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
