"""Measure the KL divergence of a policy from a reference.

It is measured on completions sampled from the policy.
"""

from pathlib import Path
from typing import Literal

import click
from pydantic import Field, PositiveInt

from dpo_opt.console import watched
from dpo_opt.options import configured, json_option
from dpo_opt.precompute.config import TemplateDate
from dpo_opt.results import show
from dpo_opt.schemas.settings import Settings


class KLConfig(Settings):
    """On-policy KL of a policy from a reference."""

    model: str
    """Policy: completions are sampled from it."""
    reference: str
    """Reference: the other model that scores them."""
    prompts: Path
    """A folder of shards, or a file of pairs, or of rows with a "prompt" and no completions."""
    column: dict[str, str] = Field(default={})
    """Of a file: name of the column that holds a part, such as prompt=question. Repeat it for each one."""
    ignore_column: list[str] = Field(default=[])
    """Of a file: a column to read as if it were not there, such as images. Repeat it for each such column."""
    template_date: TemplateDate | None = None
    """Of a file: day that a chat template is told. Default: that of the run that made --model, else today."""
    output: Path
    """Parquet file of the samples, with both models' log-probs."""
    num_prompts: PositiveInt = 64
    """Prompts to sample for, spread evenly over those given."""
    num_samples: PositiveInt = 4
    """Completions per prompt."""
    max_new_tokens: PositiveInt = 128
    """Longest completion; what lies beyond is not measured."""
    backend: Literal["auto", "vllm", "hf"] = "auto"
    """What samples. Both models' log-probs always come from transformers, so that they compare."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of both models. auto: the dtype the policy's checkpoint declares."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Seed of the sampling."""


@click.command(help=__doc__)
@configured(KLConfig)
@json_option
def command(config: KLConfig, as_json: bool) -> None:
    from dpo_opt.measure_kl import measure_kl

    show(measure_kl(config, progress=watched()), as_json)
