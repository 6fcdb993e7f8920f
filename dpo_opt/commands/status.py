"""Show how far a folder is, and how fast it fills.

It also says who last committed to it.
"""

from typing import TYPE_CHECKING, Any

import click

from dpo_opt.console import duration
from dpo_opt.options import json_option, shards_option
from dpo_opt.results import show
from dpo_opt.schemas.counts import counted
from dpo_opt.schemas.errors import quoted
from dpo_opt.schemas.locations import AnyPath

if TYPE_CHECKING:
    from dpo_opt.precompute.shards.status import Status

_MOST_SHOWN = 5


@click.command(help=__doc__)
@shards_option
@json_option
def command(shards: AnyPath, as_json: bool) -> None:
    from dpo_opt.precompute.shards.status import status

    found = status(shards)
    show(found.model_dump() if as_json else _in_words(found), as_json)


def _in_words(found: "Status") -> dict[str, Any]:
    """A folder's state as a person reads it; what is not known is None."""
    more = len(found.lost) - _MOST_SHOWN
    noun = "row" if found.unpaired else "pair"
    words = {
        **found.model_dump(include={"shards_total", "shards_committed", "pairs_total", "pairs_kept"}),
        **found.model_dump(include={"pairs_dropped", "dropped"}),
        "share_done": f"{found.share_done:.1%}",
        "pairs_per_second": found.pairs_per_second,
        "time_left": None if found.seconds_left is None else duration(found.seconds_left),
        "last_commit": _ago(found.seconds_since_commit),
        "workers": [
            f"{quoted(w.host)}{'' if w.worker is None else f' worker {w.worker}'}: "
            f"{counted(w.pairs, noun)} in {counted(w.shards, 'shard')}, {w.pairs_per_second:.3g} {noun}s/s, "
            f"last commit {_ago(w.seconds_since_commit)}"
            for w in found.workers
        ],
        "finalized": found.finalized,
        # A person wants to know of the first ones; --json has them all.
        "lost": [*found.lost[:_MOST_SHOWN], *([f"and {more} more"] if more > 0 else [])] or None,
        "next": found.next,
    }
    return {name.replace("pairs_", f"{noun}s_"): value for name, value in words.items()}


def _ago(seconds: float | None) -> str | None:
    return None if seconds is None else f"{duration(seconds)} ago"
