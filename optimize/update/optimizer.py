"""Makes the optimizer of ``--optim`` with its parameter groups; the learning rate schedule and warm-up.

The parameters' dtype decides how they are updated. bfloat16 parameters are rounded stochastically or refused,
because at DPO's learning rates rounding to the nearest silently loses most updates.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.update.bf16_adamw import RoundedAdamW, mixed
from dpo_opt.schemas.errors import ConfigError

Groups = list[dict[str, Any]]

# Moments per trained parameter. In 8 bits, AdamW's two moments also have a scale per block of 256.
_MOMENTS = {"adamw": 2, "rmsprop": 1}
_EIGHT_BIT_STATE = 2 * (1 + 4 / 256)


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> Optimizer:
    """AdamW, RMSprop as in the DPO paper (appendix B), or 8-bit AdamW; vectors are never decayed.

    Bytes per parameter, with its gradient: AdamW 16 in float32 and 8 in bfloat16 (see ``bf16_adamw``),
    RMSprop 12, 8-bit AdamW 10 and 6. All are torch's own, except AdamW for bfloat16 parameters (ours) and
    8-bit AdamW (torchao's).

    Args:
        model: Its parameters that require gradients are trained.
        config: Names the optimizer and its settings.

    Raises:
        ConfigError: The optimizer does not support the parameters' dtype, or a package that it needs is
            missing.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: Groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (config.adam_beta1, config.adam_beta2)
    dtypes = {p.dtype for p in parameters}
    if torch.float16 in dtypes:
        raise ConfigError(
            "float16 parameters cannot be trained",
            why="most DPO updates are smaller than float16's rounding, and gradients fall below its range",
            fix="pass --param-dtype float32",
        )
    if config.optim == "adamw-8bit":
        return _adamw_8bit(groups, config)
    if torch.bfloat16 in dtypes:
        if config.optim == "rmsprop":
            raise ConfigError(
                "--optim rmsprop does not go with bfloat16 parameters",
                why="without stochastic rounding most updates would be lost, and only AdamW has it here",
                fix="pass --optim adamw, or --param-dtype float32",
            )
        return RoundedAdamW(
            groups,
            lr=config.learning_rate,
            betas=betas,
            eps=config.adam_epsilon,
            weight_decay=0.0,
            seed=config.seed,
        )
    if config.optim == "rmsprop":
        return torch.optim.RMSprop(groups, lr=config.learning_rate, foreach=True)
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=True
    )


def optimizer_bytes(parameters: Iterable[Tensor], config: TrainConfig) -> int:
    """Bytes of optimizer state for these parameters, or for this process's part of them."""
    local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    if config.optim == "adamw-8bit":
        return int(_EIGHT_BIT_STATE * sum(p.numel() for p in local))
    return _MOMENTS[config.optim] * sum(p.numel() * p.itemsize for p in local)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Use ``rate`` from the next step on."""
    for group in optimizer.param_groups:
        set_group_rate(group, rate)


def set_group_rate(group: dict[str, Any], rate: float) -> None:
    """``set_learning_rate`` for one parameter group."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)  # torchao's compiled update would be compiled again for every number
    else:
        group["lr"] = rate


def learning_rate(step: int, *, total_steps: int, config: TrainConfig) -> float:
    """Learning rate of update ``step`` (from 0): linear warm-up, then constant or down to 0."""
    warmup = warmup_steps(total_steps, config)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    progress = (step - warmup) / max(1, total_steps - warmup)
    if config.lr_scheduler_type == "linear":
        return config.learning_rate * (1 - progress)
    return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def warmup_steps(total_steps: int, config: TrainConfig) -> int:
    """Number of warm-up steps: below 1, ``config.warmup_steps`` is a share of all steps, rounded up.

    From 1 on it is rounded down. Both are as in transformers.
    """
    if config.warmup_steps >= 1:
        return int(config.warmup_steps)
    # 0.07 * 100 is 7.000000000000001 and should give 7.
    return math.ceil(round(config.warmup_steps * total_steps, 9))


def _adamw_8bit(groups: Groups, config: TrainConfig) -> Optimizer:
    """torchao's 8-bit AdamW, changed so that every run with the same seed rounds in the same way.

    Parameters with fewer than 4096 elements, or a number of elements that 256 does not divide, keep their
    moments in full precision.

    Raises:
        ConfigError: There are several processes, torchao or a C++ compiler is missing, or torch.compile is
            switched off.
    """
    if any(isinstance(p, DTensor) for group in groups for p in group["params"]):
        raise ConfigError(
            "--optim adamw-8bit does not go with several processes",
            why="its 8-bit blocks cannot be assembled again from parts of parameters",
            fix="pass --optim adamw",
        )
    try:
        from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            "--optim adamw-8bit needs torchao, which is not installed", fix="pip install 'dpo-opt[torchao]'"
        ) from error
    if torch._dynamo.config.disable:
        raise ConfigError(
            "--optim adamw-8bit needs torch.compile, which is switched off in this process",
            why="torchao's update exists only once torch has compiled it",
            fix="unset TORCH_COMPILE_DISABLE TORCHDYNAMO_DISABLE",
        )
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"--optim adamw-8bit needs a C++ compiler, and {compiler!r} is not on the PATH",
            why="torchao's update exists only once torch has compiled it",
            fix="apt-get install g++, or pass --optim adamw",
        )

    class SeededAdamW8bit(AdamW8bit):  # type: ignore[misc]
        """Rounds by (seed, step), not by the state of torch's generator; keeps no moment in bfloat16."""

        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            # Moments of small parameters have the parameter's dtype: in bfloat16 they would lose updates.
            buffer: Tensor = super()._new_buffer(p, signed).float()
            return buffer

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> None:
            done = max((int(state["step"]) for state in self.state.values() if state), default=0)
            devices = {p.device for group in self.param_groups for p in group["params"] if p.is_cuda}
            with torch.random.fork_rng(devices):
                torch.manual_seed(mixed(config.seed, done))
                super().step(closure)

    return SeededAdamW8bit(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=0.0,
        bf16_stochastic_round=True,
    )
