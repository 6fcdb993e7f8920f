"""The reference of the commands, made of what ``dpo-opt COMMAND --help`` says."""

from collections.abc import Iterator
from typing import Any

import click

MARK = "<!-- every command -->"


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Put the reference in the place of ``MARK``."""
    if MARK not in markdown:
        return markdown
    from dpo_opt.cli import main

    group = click.Context(main, info_name="dpo-opt")
    commands = sorted(main.commands.items())
    return markdown.replace(
        MARK, "\n".join(line for name, c in commands for line in _section(name, c, group))
    )


def _section(name: str, command: click.Command, group: click.Context) -> Iterator[str]:
    context = click.Context(command, info_name=name, parent=group)
    usage = command.get_usage(context).removeprefix("Usage: ")
    yield from (f"## {name}", "", _escaped(command.help or ""), "", "```", " ".join(usage.split()), "```", "")
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record and record[1] and "--help" not in parameter.opts:
            flag, text = record
            yield f"* `{flag}`<br>{_escaped(' '.join(text.split()))}"
    yield ""


def _escaped(text: str) -> str:
    """Text as Markdown that shows it as it is."""
    return text.replace("\\", "\\\\").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
