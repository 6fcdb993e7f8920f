"""Every setting of ``dpo-opt train``, documented where it is declared."""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from dpo_opt.schemas.locations import Location
from dpo_opt.schemas.settings import Settings


class TrainConfig(Settings):
    """Training on cached reference log-probs. Names are TRL's where the meaning is the same."""

    shards: Location
    """Folder of reference log-probs that `dpo-opt precompute` finished."""
    model: str
    """Model to train: a folder or a Hub name. It must be the model that precompute scored the pairs with."""
    output_dir: Path
    """New folder for the run: metrics, per-pair log-probs and the final model."""
    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """DPO's beta: how strongly the policy is held to the reference. Higher keeps it closer."""
    loss_type: Literal["sigmoid"] = "sigmoid"
    """Preference loss. sigmoid: the loss of the DPO paper."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs whose chosen and rejected are assumed to be swapped by mistake (cDPO)."""
    learning_rate: float = Field(default=1e-6, ge=0, allow_inf_nan=False)
    """Peak learning rate. 0 changes no weight: the run only measures the losses of the starting policy."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up; linear and cosine end at 0."""
    warmup_steps: float = Field(default=0, ge=0, allow_inf_nan=False)
    """Steps over which the learning rate rises linearly. A number below 1 is a share of all steps."""
    optim: Literal["adamw", "rmsprop", "adamw-8bit"] = "adamw"
    """Optimizer: AdamW, the DPO paper's RMSprop, or AdamW that keeps its state in 8 bits (torchao)."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's beta1: decay of the running mean of the gradients."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """AdamW's beta2: decay of the running mean of the squared gradients."""
    adam_epsilon: float = Field(default=1e-8, gt=0, allow_inf_nan=False)
    """AdamW's epsilon, added to the denominator of the update."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight decay: decoupled in AdamW, added to the gradient in RMSprop; not for biases and norms."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Larger gradients are scaled down to this norm. 0 or inf: never."""
    batch_size: PositiveInt = 64
    """Pairs per optimizer step."""
    sample_by: Literal["pair", "prompt"] = "pair"
    """What is drawn at random: pairs, or whole prompts, so that all pairs of a prompt meet in one step."""
    micro_batch_tokens: PositiveInt | None = None
    """Most tokens per forward and backward. Changes memory and speed only. Default: from free GPU memory."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Saves memory: recompute nothing, only cheap operations (selective) or whole layers in backward."""
    num_train_epochs: PositiveInt = 1
    """How often training goes through all pairs."""
    max_steps: PositiveInt | None = None
    """Stop after this many steps; --num-train-epochs is then ignored."""
    eval_split: float = Field(default=0.0, ge=0, lt=1)
    """Share of the prompts held out for evaluation. A hash of the prompt decides which ones."""
    eval_steps: PositiveInt | None = None
    """Evaluate every N steps, and always at the end. Needs --eval-split or --eval-shards."""
    logging_steps: PositiveInt = 10
    """Write metrics every N steps."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the computation. auto: bfloat16 on a GPU, float32 on a CPU."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the stored parameters. bfloat16 halves their memory and rounds updates stochastically."""
    use_peft: bool = False
    """Train a LoRA adapter (peft) instead of all weights."""
    lora_r: PositiveInt = 16
    """Rank of the LoRA adapter."""
    lora_alpha: PositiveInt = 32
    """Scale of the LoRA adapter: its output is multiplied by lora_alpha / lora_r."""
    lora_target_modules: list[str] = []
    """Names of the layers that get an adapter. Default: all linear layers except the head."""
    adapter: Path | None = None
    """Existing LoRA adapter to train further. Precompute must have scored the model with it merged."""
    load_in_4bit: bool = False
    """QLoRA: keep the frozen weights in 4 bits (bitsandbytes, GPU)."""
    save_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the final model's weights. auto: the dtype the policy's checkpoint declares."""
    save_steps: PositiveInt | None = None
    """Save a checkpoint every N steps."""
    save_minutes: PositiveFloat | None = None
    """Save a checkpoint every N minutes."""
    save_total_limit: int = Field(default=2, ge=2)
    """How many of the newest checkpoints are kept, in addition to the best one."""
    metric_for_best_model: str | None = None
    """Metric that decides which checkpoint is the best, such as eval_rewards/accuracies."""
    resume: bool = False
    """Continue from the newest valid checkpoint in --output-dir."""
    eval_shards: list[Location] = []
    """More folders of reference log-probs to evaluate on. Each folder's name becomes part of its metrics."""
    reference_differs: bool = False
    """The shards' reference is not --model, on purpose. Skips the checks that the two are the same."""
    seed: int = Field(default=42, ge=0, lt=2**64)
    """Seed of the order of the pairs and of every other random choice."""
