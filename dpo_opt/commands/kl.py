"""Measure the KL divergence of policies from a reference.

MODELS are folders of runs, of sweeps, of checkpoints or of other models. It is measured on completions that
each policy samples, and what was measured before is not measured again.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import click
from pydantic import Field, PositiveInt

from dpo_opt.console import watched
from dpo_opt.options import configured, json_option
from dpo_opt.precompute.config import TemplateDate
from dpo_opt.results import say, show, table
from dpo_opt.schemas.settings import Settings


class KLConfig(Settings):
    """On-policy KL of policies from a reference."""

    models: list[str] = Field(default=[])
    """Folders of runs, sweeps, checkpoints or other models. Of a run, every checkpoint is measured."""
    model: str | None = None
    """One more of MODELS."""
    reference: str | None = None
    """Reference: the other model that scores them. Default: the model that the run began with."""
    prompts: Path | None = None
    """A folder of shards, or a file of pairs, or of rows with a "prompt" and no completions. Default: the
    prompts that the run held out."""
    column: dict[str, str] = Field(default={})
    """Of a file: name of the column that holds a part, such as prompt=question. Repeat it for each one."""
    ignore_column: list[str] = Field(default=[])
    """Of a file: a column to read as if it were not there, such as images. Repeat it for each such column."""
    template_date: TemplateDate | None = None
    """Of a file: day that a chat template is told. Default: that of the run that trained it, else today."""
    output: Path | None = None
    """Parquet file of the samples, with both models' log-probs. Default: in the run's folder kl/."""
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
@configured(KLConfig, argument="models")
@json_option
def command(config: KLConfig, as_json: bool) -> None:
    from dpo_opt.kl.measure import measure_kl

    found = measure_kl(config, progress=watched())
    if as_json:
        show({"kl": found}, as_json)
    else:
        say(_lines(found))


def _lines(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield from table(
        ["model", "step", "samples", "prompts", "cut", "KL per completion", "95% interval", "per token"],
        [
            [
                entry["model"],
                "-" if entry["step"] is None else entry["step"],
                entry["samples"],
                entry["prompts"],
                f"{entry['unfinished']['value']:.1%}",
                *_interval(entry["rb_sequence"] or entry["k1_sequence"]),
                f"{(entry['rb_token'] or entry['k1_token'])['value']:.4g}",
            ]
            for entry in found
        ],
    )
    yield ""
    yield "KL(policy || reference) in nats, at temperature 1, the end-of-sequence token included"
    if any(entry["unfinished"]["value"] for entry in found):
        yield "a completion that --max-new-tokens cut counts for the part that was sampled"
    if any(entry["rb_sequence"] is None for entry in found):
        yield "vocabularies of two sizes: of those models it is the mean log-ratio of the sampled tokens (k1)"


def _interval(estimate: dict[str, float | None]) -> list[str]:
    low, high = estimate["low"], estimate["high"]
    bounds = "one prompt: none" if low is None or high is None else f"{low:.4g} to {high:.4g}"
    return [f"{estimate['value']:.4g}", bounds]
