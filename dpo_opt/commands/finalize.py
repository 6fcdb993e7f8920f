"""Check that all shards are there and write the manifest."""

import click

from dpo_opt.options import json_option, shards_option
from dpo_opt.results import show
from dpo_opt.schemas.locations import AnyPath
from dpo_opt.schemas.manifest import COUNTS


@click.command(help=__doc__)
@shards_option
@json_option
def command(shards: AnyPath, as_json: bool) -> None:
    from dpo_opt.precompute.shards.finalize import finalize

    manifest = finalize(shards)
    show(manifest.model_dump(include={"rows", *COUNTS}), as_json)
