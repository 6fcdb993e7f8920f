"""Show pairs of DATA as the model will see them.

Prompt, scored tokens and cut tokens are marked. Exits with 3 where a row that is shown would be refused.
"""

import click

from dpo_opt.options import configured, json_option
from dpo_opt.precompute.config import PreviewConfig
from dpo_opt.results import show
from dpo_opt.schemas.errors import DataError


@click.command(help=__doc__)
@configured(PreviewConfig, argument="data", short={"pairs": "-n"})
@json_option
@click.pass_context
def command(context: click.Context, config: PreviewConfig, as_json: bool) -> None:
    from dpo_opt.preview import preview, rendered

    date, entries = preview(config)
    if as_json:
        show({**date.as_record(), "pairs": entries}, as_json)
    else:
        from rich.console import Console

        Console(soft_wrap=True, highlight=False).print(rendered(entries, date))
    if config.on_bad_row == "error" and any("error" in entry for entry in entries):
        context.exit(DataError.exit_code)
