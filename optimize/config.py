"""Every setting of ``dpo-opt train``, documented where it is declared."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_serializer

from dpo_opt.schemas.locations import Location
from dpo_opt.schemas.settings import Settings

LossType = Literal[
    "sigmoid", "robust", "hinge", "exo_pair", "discopop", "sigmoid_norm",
    "ipo", "ipo_sum", "sppo_hard", "cal_dpo",
    "nca_pair", "apo_zero", "apo_down",
    "rdpo", "dpop", "odpo", "rpo",
    "kto", "apo_zero_unpaired", "bco_pair", "kto_pair", "aot", "aot_unpaired", "beta_dpo",
    "simpo", "cpo", "orpo", "sft", "unlikelihood",
]  # fmt: skip
LOSS_OPTIONS = (
    "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "discopop_tau", "rdpo_alpha",
    "dpop_lambda", "margin_scale", "beta_dpo_alpha", "beta_dpo_filtered", "simpo_gamma", "cpo_alpha",
    "unlikelihood_alpha", "desirable_weight", "undesirable_weight",
)  # fmt: skip
TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]
FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


class TrainConfig(Settings):
    """Training on cached reference log-probs. Names are TRL's where the meaning is the same."""

    shards: Location
    """Folder of reference log-probs that `dpo-opt precompute` finished."""
    model: str
    """Model to train: a folder or a Hub name. It must be the model that precompute scored the pairs with."""
    output_dir: Path
    """New folder for the run: metrics, per-pair log-probs and the final model."""
    beta: PositiveFloat = 0.1
    """DPO's beta: how strongly the policy is held to the reference. Higher keeps it closer."""
    loss_type: Annotated[list[LossType], BeforeValidator(_listed), Field(min_length=1)] = ["sigmoid"]
    """Preference losses; of several the sum is trained. sigmoid: the loss of the DPO paper."""
    loss_weights: list[PositiveFloat] | None = None
    """What each loss of --loss-type is multiplied by, in the same order. Default: 1."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs whose chosen and rejected are assumed to be swapped by mistake (sigmoid: cDPO)."""
    f_divergence_type: FDivergence | None = None
    """Divergence from the reference, in losses of the difference of both completions. Default: reverse_kl."""
    f_alpha_divergence_coef: float | None = None
    """alpha_divergence's coefficient: 0 is forward_kl, 1 reverse_kl. Default: 0.5."""
    ld_alpha: float | None = Field(default=None, ge=0, le=1)
    """LD-DPO: weight of the tokens by which a completion is longer than the other. Default: 1."""
    use_weighting: bool = False
    """WPO: pairs that the policy would hardly write itself count less."""
    discopop_tau: PositiveFloat | None = None
    """discopop's temperature. Default: 0.05."""
    rdpo_alpha: NonNegativeFloat | None = None
    """rdpo: what each token more costs, as a reward. There is no default."""
    dpop_lambda: NonNegativeFloat | None = None
    """dpop: what a chosen completion that falls below the reference costs. Default: 50.0."""
    margin_scale: PositiveFloat | None = None
    """odpo and rpo: what the margin of the data is multiplied by. Default: 1.0."""
    beta_dpo_alpha: NonNegativeFloat | None = None
    """beta_dpo: how much beta follows the mean margin of a step. Default: 0.6."""
    beta_dpo_filtered: Annotated[float, Field(ge=0, lt=1)] | None = None
    """beta_dpo: share of a step's pairs that is left out, unusual margins first. Default: 0.2."""
    simpo_gamma: NonNegativeFloat | None = None
    """simpo: the margin that is aimed at. Default: 0.5."""
    cpo_alpha: NonNegativeFloat | None = None
    """cpo: weight of the cross-entropy of chosen. Default: 1.0."""
    unlikelihood_alpha: NonNegativeFloat | None = None
    """unlikelihood: weight of the rejected completion. Default: 1.0."""
    desirable_weight: PositiveFloat | None = None
    """kto and apo_zero_unpaired: weight of the losses of desirable completions. Default: 1.0."""
    undesirable_weight: PositiveFloat | None = None
    """kto and apo_zero_unpaired: weight of the losses of undesirable completions. Default: 1.0."""
    learning_rate: NonNegativeFloat = 1e-6
    """Peak learning rate. 0 changes no weight: the run only measures the losses of the starting policy."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up; linear and cosine end at 0."""
    warmup_steps: NonNegativeFloat = 0
    """Steps over which the learning rate rises linearly. A number below 1 is a share of all steps."""
    optim: Literal["adamw", "rmsprop", "adamw-8bit"] = "adamw"
    """Optimizer: AdamW, the DPO paper's RMSprop, or AdamW that keeps its state in 8 bits (torchao)."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's beta1: decay of the running mean of the gradients."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """AdamW's beta2: decay of the running mean of the squared gradients."""
    adam_epsilon: PositiveFloat = 1e-8
    """AdamW's epsilon, added to the denominator of the update."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay: decoupled in AdamW, added to the gradient in RMSprop; not for biases and norms."""
    max_grad_norm: float = Field(default=1.0, ge=0, allow_inf_nan=True)
    """Larger gradients are scaled down to this norm. 0 or inf: never."""
    batch_size: PositiveInt = 64
    """Pairs per optimizer step."""
    sample_by: Literal["pair", "prompt"] = "pair"
    """What is drawn at random: pairs, or whole prompts, so that all pairs of a prompt meet in one step."""
    micro_batch_tokens: PositiveInt | None = None
    """Most tokens per forward and backward. Changes memory and speed only. Default: from free GPU memory."""
    activation_checkpointing: Literal["none", "selective", "full"] = "selective"
    """Saves memory: backward computes nothing again, cheap operations (selective), or whole layers."""
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
    report_to: list[TrackerName] = []
    """Report the metrics to these too, under the names of TRL's runs there; each is a package of its own."""
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
    """Save a checkpoint every N steps, besides the others. At the end of the run one is saved anyway."""
    save_minutes: Annotated[float, Field(gt=0, allow_inf_nan=True)] | None = 30
    """Save a checkpoint every N minutes, while training goes on. inf: only at the end and on a signal."""
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

    @field_serializer("loss_type")
    def _single_loss_by_name(self, value: list[str]) -> list[str] | str:
        return value[0] if len(value) == 1 else value  # as runs of versions with one loss recorded it

    @property
    def loss_options(self) -> dict[str, Any]:
        """The options that the losses were given, by name; the others have the defaults of the losses."""
        found = {name: getattr(self, name) for name in LOSS_OPTIONS}
        if not self.label_smoothing:
            del found["label_smoothing"]
        return {name: value for name, value in found.items() if value is not None}

    @property
    def described_loss(self) -> str:
        """The losses with their weights, then what was set of them, in words."""
        weights = self.loss_weights or [1.0] * len(self.loss_type)
        terms = [
            name if weight == 1 else f"{weight:g} x {name}"
            for name, weight in zip(self.loss_type, weights, strict=True)
        ]
        options = {"beta": self.beta, "label_smoothing": self.label_smoothing} | self.loss_options
        if self.ld_alpha is not None:
            options["ld_alpha"] = self.ld_alpha
        return ", ".join(
            [
                " + ".join(terms),
                *(f"{name.replace('_', ' ')} {value}" for name, value in options.items()),
                *["WPO weighting"] * self.use_weighting,
            ]
        )
