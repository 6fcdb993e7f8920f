"""Write DATA as a cleaned, deduplicated dataset.

A record says what was removed, and why.
"""

import click

from dpo_opt.console import watched
from dpo_opt.options import configured, json_option
from dpo_opt.precompute.config import ConvertConfig
from dpo_opt.results import show


@click.command(help=__doc__)
@configured(ConvertConfig, argument="data")
@json_option
def command(config: ConvertConfig, as_json: bool) -> None:
    from dpo_opt.precompute.check.convert import convert

    converted = convert(config, progress=watched())
    show({"output": str(config.output), **converted._asdict()}, as_json)
