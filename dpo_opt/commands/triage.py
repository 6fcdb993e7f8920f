"""Look for pairs that are worth a look before training.

Nothing but the shards is needed: no model, no GPU. With --ches the reference reads every pair once
more, for what only its hidden states say.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dpo_opt.console import watched
from dpo_opt.options import FiniteRange, json_option, shards_option
from dpo_opt.results import say, show, table
from dpo_opt.schemas.counts import counted
from dpo_opt.schemas.errors import ConfigError, quoted
from dpo_opt.schemas.locations import AnyPath
from dpo_opt.schemas.outputs import PARQUET_KEY, output_mark, require_own_output

if TYPE_CHECKING:
    from dpo_opt.analysis.triage import Triage

_HIGH_CHES = "high_ches"
_KINDS = ("hard_to_flip", "suspect_label", "near_identical", "no_information", _HIGH_CHES)


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
    help="Largest share of the pairs whose labels are called suspect, or whose CHES is called high.",
)
@click.option(
    "--ches",
    "reference",
    metavar="MODEL",
    help="The reference: compute CHES scores with it, beside the shards (columns/), for later calls too.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Parquet file for every pair's numbers.")
@click.option(
    "--write-weights",
    "kinds",
    multiple=True,
    type=click.Choice(_KINDS),
    help="Weight pairs of this kind down, beside the shards (columns/weight.parquet), in place of what an "
    "earlier call wrote; may be repeated.",
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
    reference: str | None,
    output: Path | None,
    kinds: tuple[str, ...],
    weight: float,
    as_json: bool,
) -> None:
    from dpo_opt.analysis.triage import triage
    from dpo_opt.analysis.triage_weights import write_weights
    from dpo_opt.schemas.storage import publish

    if output is not None:
        require_own_output(output, option="--output", command="triage")
    if reference is not None:
        _compute_ches(shards, reference)
    found = triage(shards, beta=beta, suspects=suspects)
    if _HIGH_CHES in kinds and found.without_ches:
        raise ConfigError(
            f"{_HIGH_CHES}: of {counted(len(found.pairs), 'pair')}, {found.without_ches:,} without a CHES "
            "score",
            where=str(shards),
            why="none of them could be found, and all would count in full",
            fix=f"dpo-opt triage --shards {quoted(shards)} --ches REFERENCE",
        )
    if output is not None:
        with publish(output) as private:
            found.pairs.write_parquet(private, metadata={PARQUET_KEY: output_mark("triage")})
    written = write_weights(shards, found, kinds=kinds, weight=weight) if kinds else None
    if as_json:
        counts = {kind: found.count(kind) for kind in _KINDS}
        computed = {"without_ches": found.without_ches}
        files = {"output": output and str(output), "weights": written and str(written)}
        show({"pairs": len(found.pairs), **counts, **computed, **files}, as_json)
    else:
        say(_lines(found, output, written))


def _compute_ches(shards: AnyPath, reference: str) -> None:
    from dpo_opt.analysis.unpaired_rows import require_pairs
    from dpo_opt.optimize.ches import write_ches

    require_pairs(shards, fix="pass --shards with a folder of pairs")
    write_ches(shards, model=reference, progress=watched())


def _lines(found: "Triage", output: Path | None, written: AnyPath | None) -> Iterator[str]:
    from dpo_opt.analysis.triage import KINDS

    pairs = len(found.pairs)
    no_ches = found.without_ches == pairs
    counts = {kind: found.count(kind) for kind in _KINDS if not (kind == _HIGH_CHES and no_ches)}
    yield from table(
        ["kind", "pairs", "share"], [[kind, count, f"{count / pairs:.1%}"] for kind, count in counts.items()]
    )
    yield f"of {counted(pairs, 'pair')}; a pair may be of several kinds"
    yield ""
    for kind, count in counts.items():
        if count:
            yield f"{kind}: {KINDS[kind]}"
    if found.without_ches and not no_ches:
        yield f"{counted(found.without_ches, 'pair')} have no CHES: run it with --ches again"
    if output is not None:
        yield f"every pair's numbers: {output}"
    if written is not None:
        yield f"weights: {written}; training takes them from there, and without the file the data's own count"
        yield f"to go back: rm {quoted(written)}"
