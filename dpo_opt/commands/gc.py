"""Remove what killed and repeated attempts left behind."""

from typing import Any

import click

from dpo_opt.options import FiniteRange, dry_run_option, json_option, shards_option
from dpo_opt.results import show
from dpo_opt.schemas.locations import AnyPath


@click.command(help=__doc__)
@shards_option
@click.option(
    "--older-than",
    type=FiniteRange(min=0),
    default=24.0,
    show_default=True,
    help="Hours for which nobody may have written to a file; longer than any worker takes for a shard.",
)
@dry_run_option
@json_option
def command(shards: AnyPath, older_than: float, dry_run: bool, as_json: bool) -> None:
    from dpo_opt.folder_notes import listed
    from dpo_opt.precompute.shards.gc import find_garbage, remove_garbage

    garbage = find_garbage(shards, older_than_hours=older_than, look_only=dry_run)
    if not dry_run:
        remove_garbage(garbage)
    found: dict[str, Any] = {"would_remove" if dry_run else "removed": len(garbage.files)}
    found["bytes"] = garbage.size
    if dry_run:
        names = [str(path)[len(str(shards)) + 1 :] for path in garbage.files]
        found["files"] = names if as_json or not names else listed(names)
    show(found, as_json)
