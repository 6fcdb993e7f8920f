"""Heal damaged or lost files of a folder.

Exactly those shards are scored again that need it.
"""

import click

from dpo_opt.console import watched
from dpo_opt.options import dry_run_option, json_option, shards_option
from dpo_opt.results import show
from dpo_opt.schemas.errors import quoted
from dpo_opt.schemas.locations import AnyPath


@click.command(help=__doc__)
@shards_option
@dry_run_option
@json_option
def command(shards: AnyPath, dry_run: bool, as_json: bool) -> None:
    from dpo_opt.precompute.shards.repair import repair

    found = repair(shards, dry_run=dry_run, progress=watched())
    if as_json:
        show(found.model_dump(), as_json)
        return
    rebuilt = "would_rebuild" if dry_run else "rebuilt"
    words = found.model_dump() | {"rebuilt": list(map(quoted, found.rebuilt))}
    show({rebuilt if name == "rebuilt" else name: value for name, value in words.items()}, as_json)
