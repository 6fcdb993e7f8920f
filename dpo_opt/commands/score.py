"""Score every pair under any checkpoint.

The log-probs are written as a table for the analysis.
"""

from collections.abc import Iterator
from pathlib import Path

import click

from dpo_opt.console import watched
from dpo_opt.options import dtype_option, json_option, shards_option
from dpo_opt.results import say, show, table
from dpo_opt.schemas.locations import AnyPath
from dpo_opt.schemas.outputs import require_own_output
from dpo_opt.schemas.pair_logps import DTYPE_KEY


@click.command(help=__doc__)
@shards_option
@click.option("--model", required=True, help="Checkpoint to score.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Parquet file to write.")
@dtype_option("Dtype of the model. auto: as the reference was scored; float32 if trained and saved so.")
@json_option
def command(shards: AnyPath, model: str, output: Path, dtype: str, as_json: bool) -> None:
    from dpo_opt.optimize.score_folder import score_shards

    require_own_output(output, option="--output", command="score", mark=DTYPE_KEY)
    count = score_shards(shards, model=model, output=output, dtype=dtype, progress=watched())
    if as_json:
        show({"output": str(output), "pairs": count}, as_json)
    else:
        from dpo_opt.schemas.manifest import load_manifest

        say(_lines(output, model=model, noun=load_manifest(shards).fingerprint.noun))


def _lines(output: Path, *, model: str, noun: str) -> Iterator[str]:
    """Means over the pairs of a table of log-probs; ``noun`` is what one of them is called."""
    import pyarrow.parquet as pq

    from dpo_opt.schemas.arrow_file import arrow_file

    names = [f"{side}_{what}" for side in ("chosen", "rejected") for what in ("logps", "length")]
    with arrow_file(output) as raw, pq.ParquetFile(raw) as file:
        columns = [column.to_numpy() for column in file.read(columns=names).columns]
    chosen, chosen_length, rejected, rejected_length = columns
    yield f"output  {output}"
    yield f"{noun + 's':<6}  {len(chosen):,}, under {model}"
    unpaired = noun != "pair"
    if unpaired:
        yield "        each has one completion, the other side is of another prompt: see dpo-opt report"
    if unpaired or not len(chosen):
        return
    yield ""
    yield from table(
        ["mean over the pairs", "chosen", "rejected"],
        [
            ["log-prob of a completion, nats", f"{chosen.mean():.2f}", f"{rejected.mean():.2f}"],
            [
                "log-prob per token, nats",
                f"{(chosen / chosen_length).mean():.3f}",
                f"{(rejected / rejected_length).mean():.3f}",
            ],
            ["tokens of a completion", f"{chosen_length.mean():.1f}", f"{rejected_length.mean():.1f}"],
        ],
    )
    yield ""
    yield f"the chosen completion is the likelier one in {(chosen > rejected).mean():.1%} of the pairs"
