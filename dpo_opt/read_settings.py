"""Settings from a YAML file and from values, with errors that name the setting as the user writes it."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from dpo_opt.schemas.errors import ConfigError, first_line
from dpo_opt.schemas.locations import AnyPath
from dpo_opt.schemas.plain_data import json_of, yaml_of
from dpo_opt.schemas.settings import Settings

C = TypeVar("C", bound=Settings)


def read_settings(path: AnyPath, known: Sequence[str]) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        path: The file.
        known: The keys that it may have.

    Raises:
        ConfigError: It is no YAML, no mapping, or has another key.
    """
    values = read_document(path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError("not a mapping of settings to values", where=str(path))
    for key in values:
        require_known(key, known, where=str(path))
    return values


def read_document(path: AnyPath, *, form: Literal["YAML", "JSON"] = "YAML") -> Any:
    """The value that a file has.

    Raises:
        ConfigError: It is not of this form.
    """
    try:
        return (json_of if form == "JSON" else yaml_of)(path.read_text(encoding="utf-8"))
    except ValueError as error:
        said = first_line(error, named=False)
        raise ConfigError(f"not readable as {form} ({said})", where=str(path)) from error


def require_known(key: object, known: Sequence[str], *, where: str) -> None:
    """Refuse a setting that there is not.

    Raises:
        ConfigError: It is none of ``known``; the nearest one is named.
    """
    if key in known:
        return
    close = difflib.get_close_matches(str(key), known, n=1)
    raise ConfigError(
        f"unknown setting {key!r}",
        where=where,
        why="a misspelt setting would have no effect",
        fix=f"did you mean {close[0]!r}?" if close else f"known settings: {', '.join(known)}",
    )


def make_settings(
    kind: type[C], values: Mapping[str, Any], *, argument: str | None = None, where: Mapping[str, str]
) -> C:
    """A configuration of these values.

    Args:
        kind: Its class.
        values: Setting to value.
        argument: The setting that a command takes without a flag.
        where: Setting to the file in which its value stands; a flag's is left out.

    Raises:
        ConfigError: A value is refused, or a required setting is missing.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            # Settings that do not go together: no single one is wrong.
            explained = first.get("ctx", {}).get("error")
            if isinstance(explained, ConfigError):
                raise explained from error
            raise ConfigError(first["msg"].removeprefix("Value error, ")) from error
        name = str(first["loc"][0])
        flag = name.upper() if name == argument else "--" + name.replace("_", "-")
        if first["type"] == "missing":
            how = "name it after the command" if name == argument else f"pass {flag}"
            raise ConfigError(f"{flag} is missing", fix=f"{how}, or set {name} in --config") from error
        raise ConfigError(
            f"{flag} {first['input']!r}: {first['msg'].removeprefix('Value error, ')}",
            where=where.get(name),
        ) from error
