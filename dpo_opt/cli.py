"""The command line: gathers the commands of ``commands/``, and says their errors in words.

``--help`` must answer at once, so a command's file is imported when that command is called.
"""

import ast
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import click

from dpo_opt import __version__, commands
from dpo_opt.explained_errors import explained
from dpo_opt.schemas.errors import DpoOptError
from dpo_opt.schemas.safe_text import printable

_INTERRUPTED = 130


class _CommandFiles(Mapping[str, click.Command]):
    """Name of every file of ``commands/`` to its command."""

    def __iter__(self) -> Iterator[str]:
        return (found.name.replace("_", "-") for found in pkgutil.iter_modules(commands.__path__))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> click.Command:
        if name not in list(self):
            raise KeyError(name)
        command: click.Command = importlib.import_module(_module(name)).command
        command.name = name
        return command


class _Commands(click.Group):
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        # click reads this mapping and adds nothing to it.
        self.commands = _CommandFiles()  # type: ignore[assignment]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, from the docstrings of their files: importing all takes a second."""
        described = [click.Command(name, help=_docstring(name)) for name in self.commands]
        click.Group(commands=described).format_commands(ctx, formatter)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(_INTERRUPTED)
        # Of any class: `explained` knows which have a message for the user, and all others are raised.
        except Exception as error:
            known = explained(error)
            if known is None:
                raise
            raise _Explained(known) from error


class _Explained(click.ClickException):
    """A DpoOptError as click shows it: the message, no traceback, its exit code."""

    def __init__(self, error: DpoOptError) -> None:
        super().__init__(str(error))
        # click declares it for the class; here it differs by error.
        self.exit_code = error.exit_code  # type: ignore[misc]

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {printable(self.message)}", file=file or sys.stderr)


def _module(name: str) -> str:
    return f"{commands.__name__}.{name.replace('-', '_')}"


def _docstring(name: str) -> str | None:
    spec = importlib.util.find_spec(_module(name))
    # A loader of source files, and of a zipped wheel, has it.
    source: str = spec.loader.get_source(spec.name)  # type: ignore[union-attr]
    return ast.get_docstring(ast.parse(source))


@click.group(
    cls=_Commands,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
        # TRL's users type --learning_rate.
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
)
@click.version_option(__version__, prog_name="dpo-opt")
def main() -> None:
    """Score preference pairs once under the reference, then train with only the policy in memory."""
