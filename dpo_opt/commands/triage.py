"""Look for pairs that are worth a look before training.

Nothing but the shards is needed: no model, no GPU.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dpo_opt.options import FiniteRange, json_option, shards_option
from dpo_opt.results import say, show, table
from dpo_opt.schemas.errors import ConfigError, quoted
from dpo_opt.schemas.locations import AnyPath

if TYPE_CHECKING:
    from dpo_opt.analysis.triage import Triage

_KINDS = ("hard_to_flip", "suspect_label", "near_identical", "no_information")


@click.command(help=__doc__)
@shards_option
@click.option(
    "--beta",
    type=FiniteRange(min=0, min_open=True),
    default=0.1,
    show_default=True,
    help="Of the run to come; it decides what is hard to flip.",
)
@click.option(
    "--suspects",
    type=FiniteRange(0, 1),
    default=0.05,
    show_default=True,
    help="Largest share of the pairs whose labels are called suspect.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Parquet file for every pair's numbers.")
@click.option(
    "--write-weights",
    "kinds",
    multiple=True,
    type=click.Choice(_KINDS),
    help="Weight pairs of this kind down, beside the shards (columns/weight.parquet); may be repeated.",
)
@click.option(
    "--weight",
    type=FiniteRange(min=0),
    default=0.0,
    show_default=True,
    help="Factor of their weight, with --write-weights.",
)
@json_option
def command(
    shards: AnyPath,
    beta: float,
    suspects: float,
    output: Path | None,
    kinds: tuple[str, ...],
    weight: float,
    as_json: bool,
) -> None:
    from dpo_opt.analysis.triage import triage
    from dpo_opt.analysis.triage_weights import write_weights
    from dpo_opt.schemas.storage import publish

    if output is not None and output.is_dir():
        raise ConfigError("--output is a folder", where=str(output), fix="name a file, such as pairs.parquet")
    found = triage(shards, beta=beta, suspects=suspects)
    if output is not None:
        with publish(output) as private:
            found.pairs.write_parquet(private)
    written = write_weights(shards, found, kinds=kinds, weight=weight) if kinds else None
    if as_json:
        counts = {kind: found.count(kind) for kind in _KINDS}
        files = {"output": output and str(output), "weights": written and str(written)}
        show({"pairs": len(found.pairs), **counts, **files}, as_json)
    else:
        say(_lines(found, output, written))


def _lines(found: "Triage", output: Path | None, written: AnyPath | None) -> Iterator[str]:
    from dpo_opt.analysis.triage import KINDS

    pairs = len(found.pairs)
    counts = {kind: found.count(kind) for kind in _KINDS}
    yield from table(
        ["kind", "pairs", "share"], [[kind, count, f"{count / pairs:.1%}"] for kind, count in counts.items()]
    )
    yield f"of {pairs:,} pairs; a pair may be of several kinds"
    yield ""
    for kind, count in counts.items():
        if count:
            yield f"{kind}: {KINDS[kind]}"
    if output is not None:
        yield f"every pair's numbers: {output}"
    if written is not None:
        yield f"weights: {written}; training takes them from there, and without the file the data's own count"
        yield f"to go back: rm {quoted(written)}"
