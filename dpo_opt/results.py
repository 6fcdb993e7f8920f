"""How a command says what came out: words for people, JSON for machines."""

import json
from typing import TYPE_CHECKING, Any

import click
from pydantic import BaseModel

from dpo_opt.console import duration
from dpo_opt.schemas.errors import quoted
from dpo_opt.schemas.safe_text import printable

if TYPE_CHECKING:
    from dpo_opt.precompute.shards.finalize import Status

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def show(result: dict[str, Any], as_json: bool) -> None:
    """Print a result."""
    if as_json:
        click.echo(json.dumps(result, indent=1, default=_plain))
        return
    known = {name: value for name, value in result.items() if value is not None}
    width = max(len(name) for name in known)
    for name, value in known.items():
        # Names are others' as well: each stays on its line.
        click.echo(f"{name:<{width}}  {printable(' '.join(_words(value).splitlines()))}")


def status_in_words(found: "Status") -> dict[str, Any]:
    """A folder's state as a person reads it; what is not known is None."""
    return {
        **found.model_dump(include={"shards_total", "shards_committed", "pairs_total", "pairs_kept"}),
        **found.model_dump(include={"pairs_dropped", "dropped"}),
        "share_done": f"{found.share_done:.1%}",
        "pairs_per_second": found.pairs_per_second,
        "time_left": None if found.seconds_left is None else duration(found.seconds_left),
        "last_commit": _ago(found.seconds_since_commit),
        "workers": [
            f"{quoted(w.host)}{'' if w.worker is None else f' worker {w.worker}'}: {w.pairs} pairs in "
            f"{w.shards} shards, {w.pairs_per_second:.3g} pairs/s, last commit {_ago(w.seconds_since_commit)}"
            for w in found.workers
        ],
        "finalized": found.finalized,
    }


def _ago(seconds: float | None) -> str | None:
    return None if seconds is None else f"{duration(seconds)} ago"


def _words(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(member)}" for name, member in value.items()) or "none"
    if isinstance(value, list):
        return "; ".join(map(_words, value)) or "none"
    return str(value)


def _plain(value: object) -> object:
    return value.model_dump() if isinstance(value, BaseModel) else str(value)
