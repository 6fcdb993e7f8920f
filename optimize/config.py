"""Every setting of ``dpo-opt train``, documented where it is declared."""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from dpo_opt.schemas.locations import Location
from dpo_opt.schemas.settings import Settings


class TrainConfig(Settings):
    """Training on cached reference log-probs. Names are TRL's where the meaning is the same."""

    shards: Location
    """Folder of reference shards that `dpo-opt precompute` finished."""
    model: str
    """Policy to start from: a folder or a Hub name. Must be the model that was scored."""
    output_dir: Path
    """New folder for the run: metrics, per-pair log-probs and the final model."""
    beta: PositiveFloat = 0.1
    """Strength of the pull towards the reference; higher stays closer."""
    loss_type: Literal["sigmoid"] = "sigmoid"
    """Which preference loss."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of pairs whose labels are swapped (cDPO)."""
    learning_rate: PositiveFloat = 1e-6
    """Peak learning rate."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate falls after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate rises linearly."""
    optim: Literal["adamw", "rmsprop"] = "adamw"
    """AdamW, or the paper's RMSprop."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled for AdamW, added to the gradient for RMSprop; never on vectors."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm."""
    batch_size: PositiveInt = 64
    """Pairs per optimizer step."""
    micro_batch_tokens: PositiveInt = 2048
    """Most token rows per forward and backward; changes memory and speed, not the result."""
    num_train_epochs: PositiveInt = 1
    """Passes over the training pairs."""
    max_steps: PositiveInt | None = None
    """Stop after this many steps instead."""
    eval_split: float = Field(default=0.0, ge=0, lt=1)
    """Share of prompts held out for evaluation, chosen by hash of the prompt."""
    eval_steps: PositiveInt | None = None
    """Evaluate every so many steps; always at the end."""
    logging_steps: PositiveInt = 10
    """Write metrics every so many steps."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; parameters stay fp32 masters. auto: bfloat16 on a GPU, float32 on a CPU."""
    save_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the final model's weights. auto: the dtype the policy's checkpoint declares."""
    reference_differs: bool = False
    """Train towards another reference than the starting policy: skips the identity and parity gates."""
    seed: int = 42
    """Decides the order of the pairs."""
