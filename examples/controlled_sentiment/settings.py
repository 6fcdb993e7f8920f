"""The numbers of the experiment: what tiny.yaml, small.yaml and paper.yaml hold, each documented here."""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from dpo_opt.schemas.errors import ConfigError, first_line, quoted
from dpo_opt.schemas.settings import Settings

MethodName = Literal["dpo", "preferred_ft", "unlikelihood", "ppo", "ppo_gt", "best_of_n"]
TITLES: dict[MethodName, str] = {
    "dpo": "DPO",
    "preferred_ft": "Preferred-FT",
    "unlikelihood": "Unlikelihood",
    "ppo": "PPO",
    "ppo_gt": "PPO-GT",
    "best_of_n": "Best-of-N",
}
OFFLINE: tuple[MethodName, ...] = ("dpo", "preferred_ft", "unlikelihood")
"""Trained by `dpo-opt sweep` on the pairs."""
ONLINE: tuple[MethodName, ...] = ("ppo", "ppo_gt")
"""Trained by TRL on completions of their own."""


class Method(Settings):
    """What varies of one method."""

    knobs: list[PositiveFloat] = Field(default=[])
    """The values that trade reward for KL: DPO's beta, the alpha of unlikelihood, PPO's target KL in nats, N
    of Best-of-N. Preferred-FT has none."""
    learning_rates: list[PositiveFloat] = Field(default=[])
    """Of these the one with the highest reward on the validation prompts is taken."""


class Split(Settings):
    """How policies are measured on one set of prompts."""

    prompts: PositiveInt
    samples: PositiveInt
    """Completions per prompt and policy."""


class Offline(Settings):
    """Training on the pairs, alike for each loss."""

    steps: PositiveInt
    batch_size: PositiveInt
    """Pairs per step; the pairs of a prompt meet in one."""


class RewardModelSettings(Settings):
    """The learned reward: a Bradley-Terry model of the same pairs."""

    epochs: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat


class PPO(Settings):
    """TRL's PPO; names are those of its PPOConfig."""

    steps: PositiveInt
    batch_size: PositiveInt
    """Completions per step: steps x batch_size are sampled by each run."""
    mini_batch_size: PositiveInt
    ppo_epochs: PositiveInt
    init_kl_coef: PositiveFloat
    horizon: PositiveFloat
    """How many completions the KL coefficient takes to follow the target."""


class Reviews(Settings):
    """Prompts from reviews, and what else is made of these."""

    classifier_share: float = Field(ge=0, lt=1)
    """Share of the reviews that the reward's classifier is trained on. No prompt is taken from these."""
    sft_epochs: PositiveFloat
    """Fine-tuning on the whole reviews of the training prompts: the model that all methods begin with."""
    sft_learning_rate: PositiveFloat
    sft_batch_size: PositiveInt
    sft_max_tokens: PositiveInt


class Experiment(Settings):
    """One size of the experiment."""

    model: str | None = None
    """The language model, unless --model names one."""
    reward: str
    """The ground truth: FILE.py:NAME, the file relative to the folder of the settings."""
    backend: Literal["auto", "vllm", "hf"] = "auto"
    """What samples and scores, as of `dpo-opt sample`."""
    seeds: list[int] = Field(min_length=1)
    """Each is a whole repetition: samples, pairs, reward model, training, measurement."""
    train_prompts: PositiveInt
    prompt_tokens: PositiveInt
    """Tokens of each prompt, with the one that begins a text where the tokenizer has it."""
    completions: Annotated[int, Field(ge=2)]
    """Per training prompt; all their pairs are trained on."""
    max_new_tokens: PositiveInt
    checkpoints: PositiveInt
    """Policies of each run that are measured, evenly over its steps."""
    validation: Split
    held_out: Split
    reviews: Reviews | None = None
    """None: the prompts are openings of stories, and the model is taken as it is."""
    offline: Offline
    reward_model: RewardModelSettings
    ppo: PPO
    methods: dict[MethodName, Method]

    @model_validator(mode="after")
    def _is_whole(self) -> "Experiment":
        for name, steps in (("offline", self.offline.steps), ("ppo", self.ppo.steps)):
            if steps % self.checkpoints:
                raise ValueError(f"{name}: {steps} steps are no multiple of {self.checkpoints} checkpoints")
        for name, method in self.methods.items():
            if not method.knobs and name != "preferred_ft":
                raise ValueError(f"methods: {name} has no knobs")
            if name == "preferred_ft" and method.knobs:
                raise ValueError("methods: preferred_ft has no knob: its runs differ by their seeds")
            if name == "best_of_n" and any(self.held_out.samples % knob for knob in method.knobs):
                raise ValueError(f"methods: best_of_n: an N does not divide {self.held_out.samples} samples")
        rates = {len(m.learning_rates) for name, m in self.methods.items() if name != "best_of_n"}
        if len(rates) != 1 or 0 in rates:
            raise ValueError(
                "methods: each needs the same number of learning rates: it is their tuning budget"
            )
        return self

    @property
    def needs_reward_model(self) -> bool:
        return bool({"ppo", "best_of_n"} & self.methods.keys())

    def knobs(self, method: MethodName) -> list[float | None]:
        """The values of a method's knob; one None where it has none."""
        return [*self.methods[method].knobs] or [None]


def read_experiment(size: str, *, model: str | None) -> tuple[Experiment, Path]:
    """The settings of a size, and the file that has them.

    Args:
        size: tiny, small or paper, or a file of the same form.
        model: Taken in place of the file's model.

    Raises:
        ConfigError: There is no such file, it is not of this form, or no model is named.
    """
    file = Path(size) if size.endswith(".yaml") else Path(__file__).parent / f"{size}.yaml"
    if not file.is_file():
        raise ConfigError(
            f"there is no size {quoted(size)}", where=str(file), fix="--size tiny, small, paper or FILE.yaml"
        )
    try:
        values: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
        experiment = Experiment.model_validate({**values, **({"model": model} if model else {})})
    except (ValidationError, yaml.YAMLError, TypeError) as error:
        raise ConfigError(
            f"the settings cannot be used ({first_line(error)})",
            where=str(file),
            fix=f"correct {quoted(file)}; {quoted(Path(__file__).name)} documents each setting",
        ) from error
    if experiment.model is None:
        raise ConfigError(
            "no model is named", where=str(file), fix="pass --model with the folder of a language model"
        )
    return experiment, file
