"""Sample completions of prompts from a model.

They are written to Parquet, one row each, for dpo-opt judge or for anyone else.
"""

from pathlib import Path
from typing import Literal, Self

import click
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from dpo_opt.console import watched
from dpo_opt.options import configured, json_option
from dpo_opt.precompute.config import Sources, TemplateDate
from dpo_opt.results import show
from dpo_opt.schemas.settings import Settings


class SampleConfig(Settings):
    """Completions of prompts, sampled from a model."""

    model: str
    """Model that writes: a folder, or a Hub ORG/NAME@REVISION."""
    prompts: Sources = Field(min_length=1)
    """Rows with a "prompt", or pairs: files, folders, globs, URLs, a Hub ORG/NAME@REVISION."""
    column: dict[str, str] = Field(default={})
    """Name of the column that holds a part, such as prompt=question. Repeat it for each renamed column."""
    ignore_column: list[str] = Field(default=[])
    """A column to read as if it were not there, such as images. Repeat it for each such column."""
    template_date: TemplateDate | None = None
    """Day that a chat template is told which asks for it, such as 2026-03-31. Default: today."""
    output: Path
    """Folder for the completions. Running the same command again continues where it stopped."""
    num_samples: PositiveInt = 4
    """Completions per prompt."""
    max_new_tokens: PositiveInt = 256
    """Longest completion; a longer one is cut off, and marked."""
    temperature: NonNegativeFloat = 1.0
    """1: the model's own distribution. 0: the most likely token each time."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Seed; that of each prompt is made of it and of the prompt."""
    backend: Literal["auto", "vllm", "hf"] = "auto"
    """Engine. auto: vLLM if it is installed, else hf (transformers)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the model. auto: the dtype that its checkpoint declares."""
    engine_option: list[str] = Field(default=[])
    """vllm: an argument of its engine, such as tensor_parallel_size=2. Repeat it for each argument."""
    worker_index: NonNegativeInt | None = None
    """This worker's number, from 0. Default: taken from the Slurm array or RANK, else it does all work."""
    num_workers: PositiveInt | None = None
    """Number of workers, which share the prompts and the folder."""

    @model_validator(mode="after")
    def _know_the_worker(self) -> Self:
        if (self.worker_index is None) != (self.num_workers is None):
            raise ValueError("--worker-index and --num-workers go together")
        if self.num_workers is not None and (self.worker_index or 0) >= self.num_workers:
            raise ValueError(
                f"--worker-index is not below --num-workers {self.num_workers}: it counts from 0"
            )
        return self


@click.command(help=__doc__)
@configured(SampleConfig)
@json_option
def command(config: SampleConfig, as_json: bool) -> None:
    from dpo_opt.preemption import preemptible, same_command
    from dpo_opt.sample import sample

    kept = "the completions in data/ are kept; those in work are abandoned"
    with preemptible(same_command(), kept=kept):
        show(sample(config, progress=watched()), as_json)
