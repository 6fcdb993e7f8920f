"""Parameter groups, the two optimizers of the field, and the learning rate as a function of the step."""

import math

import torch
from torch.optim import Optimizer

from dpo_opt.optimize.config import TrainConfig


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> Optimizer:
    """AdamW, or RMSprop as in the DPO paper (appendix B); vectors are never decayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if config.optim == "rmsprop":
        return torch.optim.RMSprop(groups, lr=config.learning_rate, foreach=True)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.999), fused=True)


def learning_rate(step: int, *, total_steps: int, config: TrainConfig) -> float:
    """Rate of the update number ``step`` (from 0): linear warm-up, then the schedule down to 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    if config.lr_scheduler_type == "linear":
        return config.learning_rate * (1 - progress)
    return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2
