"""Merge a LoRA adapter into its base.

The result is a model to score, serve or train like any other.
"""

from pathlib import Path
from typing import Literal

import click

from dpo_opt.console import watched
from dpo_opt.options import configured, json_option
from dpo_opt.results import show
from dpo_opt.schemas.settings import Settings


class MergeConfig(Settings):
    """A LoRA adapter and its base made into one model."""

    model: str
    """The base that the adapter was trained on: a folder or a Hub name."""
    adapter: Path
    """Folder of the adapter, such as RUN/final."""
    output: Path
    """New folder for the merged model."""
    dtype: Literal["auto", "float32"] = "auto"
    """Dtype of its weights. auto: as in the base; in bfloat16 small changes are lost, as is reported."""


@click.command(help=__doc__)
@configured(MergeConfig)
@json_option
def command(config: MergeConfig, as_json: bool) -> None:
    from dpo_opt.merge import merge

    show(merge(config, progress=watched()), as_json)
