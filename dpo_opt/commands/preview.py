"""Show pairs of DATA as the model will see them.

Prompt, scored tokens and cut tokens are marked.
"""

import click

from dpo_opt.options import configured, json_option
from dpo_opt.precompute.config import PreviewConfig
from dpo_opt.results import show


@click.command(help=__doc__)
@configured(PreviewConfig, argument="data", short={"pairs": "-n"})
@json_option
def command(config: PreviewConfig, as_json: bool) -> None:
    from dpo_opt.preview import preview, rendered

    date, entries = preview(config)
    if as_json:
        show({**date.as_record(), "pairs": entries}, as_json)
        return
    from rich.console import Console

    Console(soft_wrap=True, highlight=False).print(rendered(entries, date))
