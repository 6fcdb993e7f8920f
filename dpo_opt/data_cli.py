"""The commands that look at a dataset before any GPU time: check, preview, convert."""

import click

from dpo_opt.console import watched
from dpo_opt.options import configured
from dpo_opt.precompute.config import CheckConfig, ConvertConfig, PreviewConfig
from dpo_opt.results import json_option, show
from dpo_opt.schemas.errors import DataError


@click.command()
@configured(CheckConfig, argument="data")
@json_option
@click.pass_context
def check(context: click.Context, config: CheckConfig, as_json: bool) -> None:
    """Say everything that is wrong or suspicious in DATA, on a CPU.

    Exits with 3 where a later command would refuse the data.
    """
    from dpo_opt.check_text import lines
    from dpo_opt.precompute.check.audit import audit

    found = audit(config, progress=watched())
    if config.shards is not None:
        from dpo_opt.analysis import reference_view

        found.reference = reference_view(config.shards)
    if config.html is not None:
        from dpo_opt.analysis import write_check_page

        write_check_page(found, config.html)
    if as_json:
        show(found.model_dump(), as_json)
    else:
        for line in lines(found):
            click.echo(line)
    if found.refused:
        context.exit(DataError.exit_code)


@click.command()
@configured(PreviewConfig, argument="data", short={"pairs": "-n"})
@json_option
def preview(config: PreviewConfig, as_json: bool) -> None:
    """Show pairs of DATA as the model will see them: prompt, scored tokens, cut tokens."""
    from dpo_opt.preview import preview as run
    from dpo_opt.preview import rendered

    entries = run(config)
    if as_json:
        show({"pairs": entries}, as_json)
        return
    from rich.console import Console

    Console(soft_wrap=True, highlight=False).print(rendered(entries))


@click.command()
@configured(ConvertConfig, argument="data")
@json_option
def convert(config: ConvertConfig, as_json: bool) -> None:
    """Write DATA as a cleaned, deduplicated dataset, with a record of what was removed and why."""
    from dpo_opt.precompute.check.convert import convert as run

    converted = run(config, progress=watched())
    show({"output": str(config.output), **converted._asdict()}, as_json)
