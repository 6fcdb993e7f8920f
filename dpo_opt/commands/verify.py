"""Check every byte and row of a folder of shards.

With --model, also check that the log-probs are that model's.

The verdict is kept in the folder as verify.json.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from dpo_opt.options import dtype_option, json_option, shards_option
from dpo_opt.results import say, show, table
from dpo_opt.schemas.counts import counted
from dpo_opt.schemas.locations import AnyPath

if TYPE_CHECKING:
    from dpo_opt.optimize.parity import Parity
    from dpo_opt.verify import Verdict


@click.command(help=__doc__)
@shards_option
@click.option("--model", help="Also compare the cached log-probs with this model's own.")
@click.option(
    "--pairs",
    "num_pairs",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Pairs to compare, spread over all shards.",
)
@dtype_option("Compute dtype of the comparison. auto: as training would take.")
@json_option
def command(shards: AnyPath, model: str | None, num_pairs: int, dtype: str, as_json: bool) -> None:
    from dpo_opt.verify import verify

    verdict = verify(shards, model=model, num_pairs=num_pairs, dtype=dtype)
    if as_json:
        show(verdict.as_dict(), as_json)
    else:
        say(_lines(verdict))
    verdict.require_ok()


def _lines(verdict: "Verdict") -> Iterator[str]:
    manifest = verdict.manifest
    yield (
        f"{verdict.shards}: {counted(manifest.kept, manifest.fingerprint.noun)} of "
        f"{counted(manifest.rows, 'row')} in {counted(len(manifest.shards), 'shard')}, scored by "
        f"{manifest.fingerprint.engine} in {manifest.fingerprint.dtype}"
    )
    if verdict.problems:
        yield f"integrity FAILED: {len(verdict.problems)} found"
        yield from (f"  {problem}" for problem in verdict.problems)
    else:
        yield "integrity ok: every file's hash, every row, exact coverage"
    if verdict.parity is not None:
        yield from _parity(verdict.parity, manifest.fingerprint.noun)
    elif verdict.model is not None:
        yield "parity    not measured: the files must be whole first"
    else:
        yield "parity    not measured: pass --model with the reference"
    yield from (f"note      {note}" for note in verdict.notes)


def _parity(parity: "Parity", noun: str) -> Iterator[str]:
    from dpo_opt.optimize.parity import worst_token

    state = "ok" if parity.ok else "FAILED"
    yield (
        f"parity    {state}: {counted(parity.pairs, noun)}, {counted(parity.tokens, 'token')}, "
        f"cached ({parity.cached_dtype}) minus the trainer's own ({parity.dtype})"
    )
    yield "  cached minus in batches; minus each sequence alone; floor: alone minus in batches"
    rows = [
        [
            "|loss - ln 2|" if check.name == "loss" else check.name,
            f"{check.value:.2e}",
            f"{check.limit:.2e}",
            "ok" if check.ok else f"FAILED: {check.usual_cause}",
        ]
        for check in parity.checks
    ]
    yield from (f"  {line}" for line in table(["nats per token", "measured", "limit", ""], rows))
    yield (
        f"  margin noise (sd of chosen minus rejected): {parity.margin_sd:.2e} nats per {noun}, floor "
        f"{parity.floor_margin_sd:.2e}; times beta it is the noise in the loss's logit"
    )
    yield f"  {worst_token(parity)}"
