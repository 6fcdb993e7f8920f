"""Builds the policy that training starts or resumes with: load, adapter, sharding."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from dpo_opt.optimize.adapters.lora import add_adapter, four_bit_options, plan_adapter, without_adapter
from dpo_opt.optimize.checkpoint.checkpoints import Checkpoint
from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.forward.activations import checkpoint_activations
from dpo_opt.optimize.forward.balance import ForwardCost, forward_cost
from dpo_opt.optimize.forward.load_policy import Layout, UnreadPolicy, lay_out_policy, load_policy
from dpo_opt.optimize.forward.policy import Policy, compute_dtype
from dpo_opt.optimize.forward.probe import require_same_in_compute_dtype
from dpo_opt.optimize.memory.budget import Device
from dpo_opt.optimize.prepare import Prepared
from dpo_opt.optimize.processes.distributed import World, from_first_alone
from dpo_opt.optimize.processes.fsdp import mesh_of, shard_policy
from dpo_opt.optimize.processes.parts import read_own_parts
from dpo_opt.optimize.processes.turns import in_turns
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.weights import parameter_count


def start(
    config: TrainConfig,
    prepared: Prepared,
    checkpoint: Checkpoint | None,
    *,
    world: World,
    patient: World,
    device: Device,
    say: Callable[[str], None],
) -> tuple[Policy, ForwardCost]:
    """Load the policy, and spread it over the processes.

    Args:
        config: The run's configuration.
        prepared: The shards, and the model that the run started from.
        checkpoint: The checkpoint to resume from; None for a new run.
        world: The run's processes.
        patient: The same, from ``patient_world``.
        device: Their kind of device.
        say: Called with each line that the user should read.

    Returns:
        The policy, ready for its next step, and what its forward costs.

    Raises:
        ConfigError: The model or its adapter cannot be trained.
    """
    dtype = compute_dtype(config.dtype, world.device)
    _require_together(config, dtype, world)
    model_folder, longest = prepared.model_folder, prepared.folder.manifest.fingerprint.max_length
    source = _Source(config, model_folder, checkpoint, dtype, longest, say)
    if world.size == 1:
        policy = source.whole(world.device)
        return policy, forward_cost(policy)
    mesh = mesh_of(world)
    unread = source.unread(world.device, once=lambda work: from_first_alone(work, patient))
    if isinstance(unread, str):
        say(f"each process reads the whole model before it keeps its part: {unread}")

        def load() -> tuple[Policy, ForwardCost]:
            # Each process copies its part of the model from main memory.
            whole = source.whole(torch.device("cpu"))
            cost = forward_cost(whole)
            return shard_policy(whole, world, mesh, memory=device.memory), cost

        # Stored in fp32, or less.
        policy, cost = in_turns(load, world, memory=4 * parameter_count(model_folder))
    else:
        cost = forward_cost(unread.policy)
        policy = shard_policy(unread.policy, world, mesh, memory=device.memory)
        read_own_parts(unread.weights, world.device)
    # Until now whole layers were compared, and their dtype was not always the compute dtype.
    with without_adapter(policy.model):
        require_same_in_compute_dtype(policy, where=str(model_folder))
    return policy, cost


class _Source(NamedTuple):
    """What a run's policy is made of."""

    config: TrainConfig
    model_folder: Path
    checkpoint: Checkpoint | None
    dtype: torch.dtype
    """That it computes in."""
    longest: int | None
    """Most tokens of a sequence."""
    say: Callable[[str], None]

    def whole(self, device: torch.device) -> Policy:
        """The whole policy on one device."""
        adapted = self.config.use_peft
        four_bit = adapted and self.config.load_in_4bit
        policy = load_policy(
            self._weights,
            dtype=self.dtype,
            device=device,
            trainable=not adapted,
            max_length=self.longest,
            param_dtype=self._param_dtype,
            options=four_bit_options(device, self.dtype) if four_bit else None,
        )
        self._prepare(policy)
        return policy

    def unread(
        self, device: torch.device, *, once: Callable[[Callable[[], Layout]], Layout]
    ) -> UnreadPolicy | str:
        """The policy before its weights are read, or why there is none; see ``lay_out_policy``."""
        found = lay_out_policy(
            self._weights,
            dtype=self.dtype,
            device=device,
            trainable=not self.config.use_peft,
            max_length=self.longest,
            param_dtype=self._param_dtype,
            once=once,
        )
        if not isinstance(found, str):
            # peft puts an adapter where the weights of its layer are.
            with found.weights.standing_in():
                self._prepare(found.policy)
        return found

    @property
    def _weights(self) -> Path:
        adapted = self.config.use_peft
        return self.checkpoint.path if self.checkpoint and not adapted else self.model_folder

    @property
    def _param_dtype(self) -> torch.dtype:
        # An adapter's base is not updated, so the compute dtype is exact enough; in bf16 activations halve.
        stored: torch.dtype = getattr(torch, self.config.param_dtype)
        return self.dtype if self.config.use_peft else stored

    def _prepare(self, policy: Policy) -> None:
        """Add the adapter, and let layers recompute their activations, if the run's settings say so."""
        config = self.config
        if config.use_peft:
            # A checkpoint's adapter is trained further, as one that --adapter names.
            found = self.checkpoint
            going_on = {"adapter": found.path, "lora_target_modules": []} if found else {}
            plan = plan_adapter(config.model_copy(update=going_on), self.model_folder)
            add_adapter(policy.model, plan, seed=config.seed)
            if plan.note:
                self.say(plan.note)
        checkpoint_activations(policy.model, config.activation_checkpointing)


def _require_together(config: TrainConfig, dtype: torch.dtype, world: World) -> None:
    if config.param_dtype == "bfloat16" and dtype != torch.bfloat16:
        raise ConfigError(
            "--param-dtype bfloat16 does not go with computing in float32",
            why="computing would take twice the time and be more exact than the weights it computes with",
            fix="leave --param-dtype out"
            + (", or add --dtype bfloat16" if config.optim != "rmsprop" else ""),
        )
    if config.load_in_4bit and world.size > 1:
        raise ConfigError(
            f"--load-in-4bit does not go with {world.size} processes",
            why="4-bit weights cannot be split among processes",
            fix="leave --load-in-4bit out, or start one process",
        )
