"""A verdict as lines of text: what is wrong first, then what was measured, then what is merely unusual."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dpo_opt.schemas.safe_text import printable
from dpo_opt.verify import Verdict

if TYPE_CHECKING:
    from dpo_opt.optimize.parity import Parity


def lines(verdict: Verdict) -> Iterator[str]:
    """The verdict, printable on any terminal."""
    yield from (printable(line) for line in _lines(verdict))


def _lines(verdict: Verdict) -> Iterator[str]:
    manifest = verdict.manifest
    yield (
        f"{verdict.shards}: {manifest.kept:,} pairs of {manifest.rows:,} rows in {len(manifest.shards):,} "
        f"shards, scored by {manifest.fingerprint.engine} in {manifest.fingerprint.dtype}"
    )
    if verdict.problems:
        yield f"integrity FAILED: {len(verdict.problems)} found"
        yield from (f"  {problem}" for problem in verdict.problems)
    else:
        yield "integrity ok: every file's hash, every row, exact coverage"
    if verdict.parity is not None:
        yield from _parity(verdict.parity)
    elif verdict.model is not None:
        yield "parity    not measured: the files must be whole first"
    else:
        yield "parity    not measured: pass --model with the reference"
    yield from (f"note      {note}" for note in verdict.notes)


def _parity(parity: "Parity") -> Iterator[str]:
    from dpo_opt.optimize.parity import worst_token

    state = "ok" if parity.ok else "FAILED"
    yield (
        f"parity    {state}: {parity.pairs:,} pairs, {parity.tokens:,} tokens, "
        f"cached ({parity.cached_dtype}) minus the trainer's own ({parity.dtype})"
    )
    yield "  cached minus in batches; minus each sequence alone; floor: alone minus in batches"
    yield f"  {'nats per token':<16}{'measured':>12}{'limit':>12}"
    for check in parity.checks:
        name = "|loss - ln 2|" if check.name == "loss" else check.name
        row = f"  {name:<16}{check.value:>12.2e}{check.limit:>12.2e}"
        yield f"{row}  {'ok' if check.ok else 'FAILED: ' + check.usual_cause}"
    yield (
        f"  margin noise (sd of chosen minus rejected): {parity.margin_sd:.2e} nats per pair, floor "
        f"{parity.floor_margin_sd:.2e}; times beta it is the noise in the loss's logit"
    )
    yield f"  {worst_token(parity)}"
