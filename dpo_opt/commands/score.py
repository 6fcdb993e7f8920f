"""Log-probs of every pair under any checkpoint, as a table for the analysis."""

from pathlib import Path

import click

from dpo_opt.console import watched
from dpo_opt.options import json_option, shards_option
from dpo_opt.results import show
from dpo_opt.schemas.locations import AnyPath


@click.command(help=__doc__)
@shards_option
@click.option("--model", required=True, help="Checkpoint to score.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Parquet file to write.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Dtype of the model. auto: as its checkpoint declares.",
)
@json_option
def command(shards: AnyPath, model: str, output: Path, dtype: str, as_json: bool) -> None:
    from dpo_opt.optimize.score_folder import score_shards

    count = score_shards(shards, model=model, output=output, dtype=dtype, progress=watched())
    show({"output": str(output), "pairs": count}, as_json)
