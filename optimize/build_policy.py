"""From a configuration to a policy that is ready for its next step: new, or as a checkpoint left it."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from dpo_opt.optimize.adapters.lora import FOUR_BIT_OFFSET, add_adapter, four_bit_options, plan_adapter
from dpo_opt.optimize.checkpoint.checkpoints import Checkpoint
from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.forward.activations import checkpoint_activations
from dpo_opt.optimize.forward.balance import ForwardCost, forward_cost
from dpo_opt.optimize.forward.load_policy import load_policy
from dpo_opt.optimize.forward.policy import Policy, compute_dtype
from dpo_opt.optimize.forward.probe import require_same_in_compute_dtype
from dpo_opt.optimize.measure_parity import ALONE_PAIRS, PARITY_PAIRS, measure_parity, spread_pairs
from dpo_opt.optimize.parity import Parity, require_parity
from dpo_opt.optimize.processes.distributed import World
from dpo_opt.optimize.processes.sharding import shard_policy
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.shard_folder import ShardFolder


class Started(NamedTuple):
    """A policy at the beginning of a run, or where its checkpoint left it."""

    policy: Policy
    cost: ForwardCost
    parity: Parity | None
    """None where the reference differs on purpose."""


def start(
    config: TrainConfig,
    folder: ShardFolder,
    model_folder: Path,
    checkpoint: Checkpoint | None,
    *,
    world: World,
    say: Callable[[str], None],
) -> Started:
    """Load the policy, spread it over the processes, and compare it with the cached reference.

    Args:
        config: Of the run.
        folder: The shards.
        model_folder: The model that the run starts, or started, from.
        checkpoint: Where it goes on; None at its beginning.
        world: The processes.
        say: Told what a person should know.

    Raises:
        ConfigError: The model or its adapter cannot be trained.
        FingerprintError: The cached log-probs are not the policy's own.
    """
    dtype = compute_dtype(config.dtype, world.device)
    _require_together(config, dtype, world)
    adapted = config.use_peft
    four_bit = adapted and config.load_in_4bit
    policy = load_policy(
        checkpoint.path if checkpoint and not adapted else model_folder,
        dtype=dtype,
        # Each process of several takes its part of it from main memory.
        device=world.device if world.size == 1 else torch.device("cpu"),
        trainable=not adapted,
        max_length=folder.manifest.fingerprint.max_length,
        # Below an adapter nothing is updated, and activations are half as large.
        param_dtype=dtype if adapted else getattr(torch, config.param_dtype),
        options=four_bit_options(world.device, dtype) if four_bit else None,
    )
    if adapted:
        # The adapter of a checkpoint is one to go on from.
        going_on = {"adapter": checkpoint.path, "lora_target_modules": []} if checkpoint else {}
        plan = plan_adapter(config.model_copy(update=going_on), model_folder)
        add_adapter(policy.model, plan, seed=config.seed)
        if plan.note:
            say(plan.note)
    checkpoint_activations(policy.model, config.activation_checkpointing)
    cost = forward_cost(policy)
    policy = shard_policy(policy, world)
    if world.size > 1:
        # Loading has looked at another device and at whole parameters.
        require_same_in_compute_dtype(policy, where=str(model_folder))

    if checkpoint is not None:
        kept = checkpoint.state.parity
        # Another version of this program may have measured more.
        known = {name: value for name, value in (kept or {}).items() if name in Parity._fields}
        return Started(policy, cost, Parity(**known) if known else None)
    if config.reference_differs:
        say("the reference is another model than the starting policy: parity is not checked")
        return Started(policy, cost, None)
    cached_dtype = folder.manifest.fingerprint.dtype
    sample = spread_pairs(folder, PARITY_PAIRS)
    parity = measure_parity(policy, sample, cached_dtype=cached_dtype, alone=ALONE_PAIRS)
    if four_bit:
        say(f"{FOUR_BIT_OFFSET} (mean {parity.mean:+.1e}, sd {parity.sd:.1e} nats per token)")
    else:
        require_parity(parity, shards=str(config.shards), model=config.model)
    return Started(policy, cost, parity)


def _require_together(config: TrainConfig, dtype: torch.dtype, world: World) -> None:
    if config.param_dtype == "bfloat16" and dtype != torch.bfloat16:
        raise ConfigError(
            "--param-dtype bfloat16 does not go with computing in float32",
            why="the products would have more digits than the weights, for twice the time",
            fix="add --dtype bfloat16, or leave --param-dtype out",
        )
    if config.load_in_4bit and world.size > 1:
        raise ConfigError(
            f"--load-in-4bit does not go with {world.size} processes",
            why="weights in 4 bits cannot be spread over them",
            fix="leave --load-in-4bit out, or start one process",
        )
