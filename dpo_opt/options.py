"""Command-line options made from a configuration's fields, so that each setting is declared once.

A field's name, type, default and docstring become ``--name``, its type, its default and its help;
``--config run.yaml`` may give any of them, and flags win.
"""

import math
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeVar

import click
from pydantic.fields import FieldInfo

from dpo_opt.complete_fix import complete_fix
from dpo_opt.read_settings import make_settings, read_settings
from dpo_opt.schemas.errors import DpoOptError
from dpo_opt.schemas.locations import AnyPath, is_file, location
from dpo_opt.schemas.settings import Settings

C = TypeVar("C", bound=Settings)
Command = Callable[..., None]

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Check everything, print the plan, write nothing."
)


def dtype_option(text: str) -> Callable[[Command], Command]:
    """The option ``--dtype``, for a command that computes with a model.

    Args:
        text: Its help.
    """
    return click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16"]),
        default="auto",
        show_default=True,
        help=text,
    )


class OtherFile(NamedTuple):
    """An option for a file of another program's settings."""

    flag: str
    help: str
    read: Callable[[AnyPath], Mapping[str, Any]]
    """Gives the settings that the file means here; those of ``--config`` and flags win."""


def configured(
    kind: type[C],
    *,
    argument: str | None = None,
    short: Mapping[str, str] = MappingProxyType({}),
    other: OtherFile | None = None,
) -> Callable[[Command], Command]:
    """Give a command every field of ``kind`` as an option; it receives the result as ``config``.

    Args:
        kind: The configuration.
        argument: A field that lists things, and is given without a flag.
        short: Field to a one-letter flag, such as ``-n``.
        other: An option for settings of another program.
    """

    def decorate(command: Command) -> Command:
        def run(config_file: AnyPath | None, other_file: AnyPath | None = None, **given: Any) -> None:
            # An option that may be given several times, and was not, is an empty tuple.
            flags = {
                name: None if value == () else value
                for name in list(given)
                if name in kind.model_fields
                for value in [given.pop(name)]
            }
            first = other.read(other_file) if other and other_file else {}
            config = _resolve(kind, config_file, flags, argument, first)
            try:
                command(config=config, **given)
            except DpoOptError as error:
                error.fix = None if error.fix is None else complete_fix(error.fix, config)
                raise

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__click_params__ = list(getattr(command, "__click_params__", []))  # type: ignore[attr-defined]
        for name, field in reversed(kind.model_fields.items()):
            if name == argument:
                click.argument(name, nargs=-1, metavar=f"{name.upper()}...")(run)
            else:
                _option(name, field, *([short[name]] if name in short else []))(run)
        if other:
            click.option(other.flag, "other_file", type=LocationType(existing_file=True), help=other.help)(
                run
            )
        click.option(
            "--config",
            "config_file",
            type=LocationType(existing_file=True),
            help="YAML file with any of these settings; flags win.",
        )(run)
        return run

    return decorate


def _option(name: str, field: FieldInfo, *short: str) -> Callable[[Command], Command]:
    kind = _without_none(field.annotation)
    flag = "--" + name.replace("_", "-")
    text = (field.description or "").replace("`", "'")
    if not field.is_required() and field.default not in (None, [], {}):
        shown = field.default
        if isinstance(shown, bool):
            shown = "on" if shown else "off"
        elif isinstance(shown, list):
            shown = " ".join(map(str, shown))
        text += f"  [default: {shown}]"
    if field.is_required():
        text += "  [required]"
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)
    several = typing.get_origin(kind)
    if several is dict:
        return click.option(flag, name, type=_Assignment(), multiple=True, help=text, metavar="PART=NAME")
    if several is list:
        (kind,) = map(_without_none, typing.get_args(kind))
    return click.option(
        flag, *short, name, type=_click_type(kind), default=None, multiple=several is list, help=text
    )


class ListsCommand(click.Command):
    """A command without arguments: what takes several values takes them in one go too, as in TRL.

    ``--loss-type sigmoid sft`` is ``--loss-type sigmoid --loss-type sft``.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the flag before each further value."""
        spelt = ctx.token_normalize_func or str
        lists = {flag for p in self.params if isinstance(p, click.Option) and p.multiple for flag in p.opts}
        spread: list[str] = []
        flag, has_value = None, True
        for word in args:
            if not has_value:
                spread.append(word)
                has_value = True
            elif word.startswith("-"):
                name, equals, _ = word.partition("=")
                flag = name if spelt(name) in lists else None
                has_value = flag is None or bool(equals)
                spread.append(word)
            else:
                spread += [word] if flag is None else [flag, word]
        return super().parse_args(ctx, spread)


class _Assignment(click.ParamType[Any]):
    """``key=value``, as one item of a mapping."""

    name = "assignment"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        key, equals, content = str(value).partition("=")
        if not (key and equals and content):
            self.fail(f"{value!r} is not of the form key=value", param, ctx)
        return key, content


class FiniteRange(click.FloatRange):
    """A number between bounds. click lets NaN and infinity pass, for which no bound holds."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


class LocationType(click.ParamType[AnyPath]):
    """A path, or the URL of a store."""

    name = "path"

    def __init__(self, *, existing_file: bool = False) -> None:
        self._existing_file = existing_file

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> AnyPath:
        path = location(value)
        if self._existing_file and not is_file(path):
            self.fail(f"File {str(value)!r} does not exist.", param, ctx)
        return path


class _Choice(click.Choice[str]):
    """One of some words; click would show and match them as it does names of options, with hyphens."""

    def normalize_choice(self, choice: object, ctx: click.Context | None) -> str:
        """The word as it is declared, with whichever of both signs it was typed."""
        typed = str(choice)
        return next((word for word in self.choices if _alike(word, typed)), typed)


def _alike(word: str, typed: str) -> bool:
    return word.replace("-", "_") == typed.replace("-", "_")


shards_option = click.option(
    "--shards", type=LocationType(), required=True, help="Folder of reference shards, or its s3:// URL."
)


def _without_none(annotation: Any) -> Any:
    if annotation == AnyPath:
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        (annotation,) = (a for a in typing.get_args(annotation) if a is not types.NoneType)
    # Annotated[int, ...]: the constraint is pydantic's to check.
    return typing.get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation


def _click_type(kind: Any) -> click.ParamType[Any]:
    if typing.get_origin(kind) is Literal:
        return _Choice(list(typing.get_args(kind)))
    if kind == AnyPath:
        return LocationType()
    if kind is Path:
        return click.Path(path_type=Path)
    simple: dict[type, click.ParamType[Any]] = {int: click.INT, float: click.FLOAT, str: click.STRING}
    return simple[kind]


def _resolve(
    kind: type[C],
    config_file: AnyPath | None,
    flags: dict[str, Any],
    argument: str | None,
    first: Mapping[str, Any],
) -> C:
    """The configuration from a file and flags, and below them what ``first`` says.

    Raises:
        ConfigError: A key is unknown, a value is refused, or a required setting is missing.
    """
    given = read_settings(config_file, list(kind.model_fields)) if config_file else {}
    where = dict.fromkeys(given, str(config_file))
    values = {**first, **given}
    for name, value in flags.items():
        if value is None:
            continue
        where.pop(name, None)
        if isinstance(value, tuple):
            of_mapping = typing.get_origin(kind.model_fields[name].annotation) is dict
            values[name] = dict(value) if of_mapping else list(value)
        else:
            values[name] = value
    return make_settings(kind, values, argument=argument, where=where)
