"""How a command says what came out: words for people, JSON for machines."""

import json
from typing import Any

import click
from pydantic import BaseModel

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def show(result: dict[str, Any], as_json: bool) -> None:
    """Print a result."""
    if as_json:
        click.echo(json.dumps(result, indent=1, default=_plain))
        return
    known = {name: value for name, value in result.items() if value is not None}
    width = max(len(name) for name in known)
    for name, value in known.items():
        click.echo(f"{name:<{width}}  {_words(value)}")


def _words(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(member)}" for name, member in value.items()) or "none"
    if isinstance(value, list):
        return "; ".join(map(str, value)) or "none"
    return str(value)


def _plain(value: object) -> object:
    return value.model_dump() if isinstance(value, BaseModel) else str(value)
