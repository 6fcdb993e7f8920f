"""Shards a policy over the processes of a run with PyTorch's FSDP2; gathers or copies it for saving.

Each process keeps its part of every parameter, gradient and optimizer state. A layer is gathered only while
it runs.
"""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from dpo_opt.optimize.forward.architecture import decoder_layers
from dpo_opt.optimize.forward.packing import Batch
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.processes.distributed import World
from dpo_opt.optimize.processes.exchanges import Exchanges
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.pairs import TokenSequence

# Largest share of a GPU's memory for the unsharded fp32 gradients that a step adds up before the exchange.
_WHOLE_GRADIENTS_SHARE = 0.2


class _Root(torch.nn.Module):
    """Decoder and head as one module, so that FSDP sees its forward begin and end and gathers the head.

    A direct call of ``model.base_model`` would bypass the root's hooks: the weights of the head, and maybe of
    the embedding, would still be only this process's part.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.model = policy.model
        self._policy = policy

    def forward(self, batch: Batch, log_squares: Tensor | None) -> Tensor:
        return self._policy.batch_logps(batch, log_squares=log_squares)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardedPolicy(Policy):
    """A policy of which this process holds a part. Every process must call the same methods equally often."""

    root: FSDPModule
    shell: PreTrainedModel
    """The model on the ``meta`` device: its structure without numbers."""
    reduces_once: bool
    """Whether gradients are exchanged only after a step's last micro-batch. After each takes less memory."""
    exchanges: Exchanges

    def batch_logps(self, batch: Batch, *, log_squares: Tensor | None = None) -> Tensor:
        """See ``Policy``."""
        # FSDP hands a tensor on that is on its device, so the same one is filled.
        logps: Tensor = cast(torch.nn.Module, self.root)(batch, log_squares)
        if not torch.is_grad_enabled():
            # With gradients, backward does this. Later readers of the parameters must not find gathered ones.
            self.root.reshard()
        return logps


def mesh_of(world: World) -> DeviceMesh:
    """The run's processes as torch's mesh of one dimension. All of them must call this."""
    return init_device_mesh(world.device.type, (world.size,))


def shard_policy(
    policy: Policy, world: World, mesh: DeviceMesh | None = None, *, memory: int | None = None
) -> Policy:
    """Shard a policy's parameters over all processes. A single process gets it back as it is.

    Gradients are summed over the processes in fp32, not averaged: the loss is divided by the step's pairs.

    Args:
        policy: The same on every process, with activation checkpointing set up. Its model is changed. It may
            be on the CPU while the world's device is a GPU: the layers are then moved and sharded one by one.
        world: The run's processes.
        mesh: The processes as torch's mesh of one dimension. With it, nothing is exchanged; None: it is made.
        memory: Bytes of the smallest of the processes' GPUs; None on a CPU.

    Raises:
        ConfigError: This version of torch is too old.
    """
    if world.size == 1:
        return policy
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ConfigError(
            f"torch {torch.__version__} is too old to train with {world.size} processes",
            fix="pip install --upgrade torch",
        )
    shard = partial(
        fully_shard,
        mesh=mesh or mesh_of(world),
        # Batches hold integers, and the inputs of a layer already have its dtype.
        mp_policy=MixedPrecisionPolicy(
            param_dtype=policy.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
    )
    shell = shell_of(policy.model)
    for layer in decoder_layers(policy.model):
        shard(layer)
    on_device = replace(policy, device=world.device)
    root = shard(_Root(on_device))
    exchanges = Exchanges()
    for module in (root, *policy.model.modules()):
        if isinstance(module, FSDPModule):
            exchanges.attach(module)
            module.set_gradient_divide_factor(1.0)
            # Otherwise torch fuses a multiplication into the sum, which gloo does not support.
            module.set_force_sum_reduction_for_comms(True)
    # If no token of this process visited an expert, the other processes still wait for its gradient.
    root.set_reduce_scatter_unused_params(True)
    return ShardedPolicy(
        **{field.name: getattr(on_device, field.name) for field in fields(on_device)},
        root=root,
        shell=shell,
        reduces_once=_room_for_gradients(policy.model, memory),
        exchanges=exchanges,
    )


def _room_for_gradients(model: PreTrainedModel, memory: int | None) -> bool:
    """Whether a GPU of ``memory`` bytes keeps the model's whole fp32 gradients during a step."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return memory is None or 4 * trained <= _WHOLE_GRADIENTS_SHARE * memory


def announce_micro_batch(policy: Policy, *, last: bool) -> None:
    """Tell FSDP, before a micro-batch begins, whether it is the step's last one."""
    if isinstance(policy, ShardedPolicy):
        policy.exchanges.begin()
        policy.root.set_requires_gradient_sync(last or not policy.reduces_once)


def join_empty(policy: Policy, *, backward: bool) -> None:
    """Run a micro-batch without pairs, on a process that has fewer micro-batches than the others.

    It is a forward of one row. Its upstream gradient is 0; a loss multiplied by 0 would let an infinite value
    reach a gradient.
    """
    token = np.zeros(1, dtype=np.int32)
    batch = policy.layout([(TokenSequence(token, token),)]).to(policy.device)
    logps = policy.batch_logps(batch)
    if backward:
        torch.autograd.backward(logps, torch.zeros_like(logps))


def finish_broken_off(policy: Policy, *, backward: bool) -> None:
    """Make the exchanges that are left of a micro-batch in which memory ran out: the others wait for them.

    The gradients of the step are then of no use on any process.

    Args:
        policy: This process's part of the policy.
        backward: Whether the other processes compute gradients now. If they first do so after an exchange of
            other numbers, this is called before it and after it.
    """
    if isinstance(policy, ShardedPolicy):
        # Otherwise FSDP takes what comes for a part of the forward or backward that broke off.
        policy.root.reset_iter_state()
        policy.exchanges.leave_out_made()
    join_empty(policy, backward=backward)


def gather_tensors(
    tensors: Mapping[str, Tensor], world: World, *, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Gather whole tensors in the first process's main memory, one by one. Other processes get none.

    Args:
        tensors: The same names on every process.
        world: The run's processes.
        dtype: Dtype that tensors are cast to before they are sent; None: their own.
    """
    gathered = {}
    for name, tensor in tensors.items():
        part = tensor.detach()
        part = part if dtype is None or not part.is_floating_point() else part.to(dtype)
        whole = part.full_tensor() if isinstance(part, DTensor) else part
        if world.first:
            gathered[name] = whole.cpu()
    return gathered


def gather_policy(policy: Policy, world: World, *, dtype: torch.dtype | None = None) -> Policy | None:
    """The whole policy on the first process's CPU, ready to be saved; None on the other processes.

    Takes the size of the weights in main memory, and one parameter at a time on every device. A policy that
    is not sharded is returned as it is.

    Args:
        policy: This process's part of the policy.
        world: The run's processes.
        dtype: Dtype of the weights; None: their own.
    """
    if not isinstance(policy, ShardedPolicy):
        return policy
    tensors = gather_tensors(named_weights(policy), world, dtype=dtype)
    return assembled(policy, policy.shell, tensors) if world.first else None


def named_weights(policy: Policy, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """A policy's tensors as a checkpoint names them, not copies.

    Args:
        policy: Sharded or not.
        names: The wanted ones; None: all.
    """
    tied = _tied_names(policy.model)
    return {
        name: tensor.detach()
        for name, tensor in policy.model.state_dict().items()
        if name not in tied and (names is None or name in names)
    }


def assembled(policy: Policy, shell: PreTrainedModel, tensors: Mapping[str, Tensor]) -> Policy:
    """A policy on the CPU, ready to be saved.

    Args:
        policy: The policy that the tensors belong to.
        shell: From ``shell_of`` its model, which it is a copy of.
        tensors: All that ``named_weights`` names.
    """
    whole = copy.deepcopy(shell)
    whole.load_state_dict(tensors, assign=True, strict=not _tied_names(whole))
    whole.tie_weights()
    return Policy(whole, torch.device("cpu"), policy.dtype, policy.packs)


def _tied_names(model: PreTrainedModel) -> set[str]:
    """A tied parameter has two names in a model's state and is saved under one of them; this is the other."""
    once = {name for name, _ in model.named_parameters()}
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - once


def shell_of(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model without numbers; after fully_shard the model can no longer be copied."""
    memo: dict[int, object] = {
        id(p): torch.nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    memo |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, memo)
