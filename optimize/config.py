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
    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """Strength of the pull towards the reference; higher stays closer."""
    loss_type: Literal["sigmoid"] = "sigmoid"
    """Which preference loss."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of pairs whose labels are swapped (cDPO)."""
    learning_rate: float = Field(default=1e-6, ge=0, allow_inf_nan=False)
    """Peak learning rate. 0 trains nothing: the run measures the losses of the starting policy."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate falls after the warm-up."""
    warmup_steps: float = Field(default=0, ge=0, allow_inf_nan=False)
    """Steps over which the rate rises linearly; below 1, their share of all steps."""
    optim: Literal["adamw", "rmsprop", "adamw-8bit"] = "adamw"
    """AdamW, the paper's RMSprop, or AdamW with its state in 8 bits (torchao)."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's mean of gradients."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of AdamW's mean of squared gradients."""
    adam_epsilon: float = Field(default=1e-8, gt=0, allow_inf_nan=False)
    """Added to the root of AdamW's mean of squared gradients."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Decoupled for AdamW, added to the gradient for RMSprop; never on vectors."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this norm; 0 or inf leaves them as they are."""
    batch_size: PositiveInt = 64
    """Pairs per optimizer step."""
    micro_batch_tokens: PositiveInt | None = None
    """Most token rows per forward and backward; changes memory and speed alone. Default: chosen."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What of the forward is computed again in backward, to save memory: nothing, what is cheap, or all."""
    num_train_epochs: PositiveInt = 1
    """Passes over the training pairs."""
    max_steps: PositiveInt | None = None
    """Stop after this many steps instead."""
    eval_split: float = Field(default=0.0, ge=0, lt=1)
    """Share of prompts held out for evaluation, chosen by hash of the prompt."""
    eval_steps: PositiveInt | None = None
    """Evaluate every so many steps; always at the end. Needs eval_split or eval_shards."""
    logging_steps: PositiveInt = 10
    """Write metrics every so many steps."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype. auto: bfloat16 on a GPU, float32 on a CPU."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the parameters; bfloat16 takes half the memory, and updates are rounded stochastically."""
    use_peft: bool = False
    """Train a LoRA adapter (peft) instead of all weights."""
    lora_r: PositiveInt = 16
    """Rank of the adapter."""
    lora_alpha: PositiveInt = 32
    """The adapter's output counts lora_alpha / lora_r times."""
    lora_target_modules: list[str] = []
    """Names of the layers that get an adapter. Default: all linear layers but the head."""
    adapter: Path | None = None
    """Adapter to go on from; its reference must have been scored with it merged."""
    load_in_4bit: bool = False
    """QLoRA: keep the frozen weights in 4 bits (bitsandbytes, GPU)."""
    save_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the final model's weights. auto: the dtype the policy's checkpoint declares."""
    save_steps: PositiveInt | None = None
    """Save a checkpoint every so many steps."""
    save_minutes: PositiveFloat | None = None
    """Save a checkpoint every so many minutes."""
    save_total_limit: int = Field(default=2, ge=2)
    """How many checkpoints are kept; the best one is kept beside them."""
    metric_for_best_model: str | None = None
    """Metric, such as eval_rewards/accuracies, that decides which checkpoint is the best."""
    resume: bool = False
    """Go on from the newest valid checkpoint of the output folder."""
    eval_shards: list[Location] = []
    """More folders of shards to evaluate on; metrics are named after them."""
    reference_differs: bool = False
    """Train towards another reference than the starting policy: skips the identity and parity gates."""
    seed: int = Field(default=42, ge=0, lt=2**64)
    """Decides the order of the pairs."""
