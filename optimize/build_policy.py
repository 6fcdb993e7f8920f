"""Builds the policy that training starts or resumes with: load, adapter, sharding."""

from collections.abc import Callable
from pathlib import Path

import torch

from dpo_opt.optimize.adapters.lora import add_adapter, four_bit_options, plan_adapter
from dpo_opt.optimize.checkpoint.checkpoints import Checkpoint
from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.forward.activations import checkpoint_activations
from dpo_opt.optimize.forward.balance import ForwardCost, forward_cost
from dpo_opt.optimize.forward.load_policy import load_policy
from dpo_opt.optimize.forward.policy import Policy, compute_dtype
from dpo_opt.optimize.forward.probe import require_same_in_compute_dtype
from dpo_opt.optimize.memory.budget import Device
from dpo_opt.optimize.processes.distributed import World
from dpo_opt.optimize.processes.fsdp import mesh_of, shard_policy
from dpo_opt.optimize.processes.turns import in_turns
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.weights import parameter_count


def start(
    config: TrainConfig,
    folder: ShardFolder,
    model_folder: Path,
    checkpoint: Checkpoint | None,
    *,
    world: World,
    device: Device,
    say: Callable[[str], None],
) -> tuple[Policy, ForwardCost]:
    """Load the policy, and spread it over the processes.

    Args:
        config: The run's configuration.
        folder: The shards.
        model_folder: The model that the run started from.
        checkpoint: The checkpoint to resume from; None for a new run.
        world: The run's processes.
        device: Their kind of device.
        say: Called with each line that the user should read.

    Returns:
        The policy, ready for its next step, and what its forward costs.

    Raises:
        ConfigError: The model or its adapter cannot be trained.
    """
    dtype = compute_dtype(config.dtype, world.device)
    _require_together(config, dtype, world)
    longest = folder.manifest.fingerprint.max_length
    if world.size == 1:
        policy = _load(config, model_folder, checkpoint, dtype, world.device, longest, say=say)
        return policy, forward_cost(policy)
    mesh = mesh_of(world)

    def load() -> tuple[Policy, ForwardCost]:
        # Each process copies its part of the model from main memory.
        policy = _load(config, model_folder, checkpoint, dtype, torch.device("cpu"), longest, say=say)
        cost = forward_cost(policy)
        return shard_policy(policy, world, mesh, memory=device.memory), cost

    # Stored in fp32, or less.
    policy, cost = in_turns(load, world, memory=4 * parameter_count(model_folder))
    # Loading checked the model on the CPU with whole parameters; now it is sharded and on its device.
    require_same_in_compute_dtype(policy, where=str(model_folder))
    return policy, cost


def _load(
    config: TrainConfig,
    model_folder: Path,
    checkpoint: Checkpoint | None,
    dtype: torch.dtype,
    device: torch.device,
    longest: int | None,
    *,
    say: Callable[[str], None],
) -> Policy:
    """The whole policy on one device."""
    adapted = config.use_peft
    four_bit = adapted and config.load_in_4bit
    policy = load_policy(
        checkpoint.path if checkpoint and not adapted else model_folder,
        dtype=dtype,
        device=device,
        trainable=not adapted,
        max_length=longest,
        # An adapter's base is not updated, so the compute dtype is exact enough; in bf16 activations halve.
        param_dtype=dtype if adapted else getattr(torch, config.param_dtype),
        options=four_bit_options(device, dtype) if four_bit else None,
    )
    if adapted:
        # A checkpoint's adapter is trained further, as one that --adapter names.
        going_on = {"adapter": checkpoint.path, "lora_target_modules": []} if checkpoint else {}
        plan = plan_adapter(config.model_copy(update=going_on), model_folder)
        add_adapter(policy.model, plan, seed=config.seed)
        if plan.note:
            say(plan.note)
    checkpoint_activations(policy.model, config.activation_checkpointing)
    return policy


def _require_together(config: TrainConfig, dtype: torch.dtype, world: World) -> None:
    if config.param_dtype == "bfloat16" and dtype != torch.bfloat16:
        raise ConfigError(
            "--param-dtype bfloat16 does not go with computing in float32",
            why="computing would take twice the time and be more exact than the weights it computes with",
            fix="add --dtype bfloat16, or leave --param-dtype out",
        )
    if config.load_in_4bit and world.size > 1:
        raise ConfigError(
            f"--load-in-4bit does not go with {world.size} processes",
            why="4-bit weights cannot be split among processes",
            fix="leave --load-in-4bit out, or start one process",
        )
