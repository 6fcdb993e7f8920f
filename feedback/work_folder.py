"""A folder of work that may be stopped at any time: what it was begun with, and that only goes on with it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_opt.schemas.errors import ConfigError, DataError, FingerprintError, first_line, quoted
from dpo_opt.schemas.plain_data import json_of
from dpo_opt.schemas.storage import write_text

SETTINGS = "settings.json"
"""What decides the content of a folder: written first, and compared by every later run."""


def begin_or_resume(folder: Path, settings: Mapping[str, Any], *, kind: str, has_results: bool) -> None:
    """Begin a folder with settings, or require that it was begun with the same.

    Args:
        folder: New, or begun before.
        settings: Of plain JSON.
        kind: A key that every folder of the command has in its settings, and no other command's.
        has_results: Something was kept in it. What failed before that may be begun otherwise.

    Raises:
        ConfigError: The folder holds other files, or is another command's.
        FingerprintError: It was begun with other settings.
        DataError: Its settings cannot be read.
    """
    require_own(folder, settings, kind=kind, has_results=has_results)
    if not has_results:
        write_text(folder / SETTINGS, json.dumps(settings, indent=1) + "\n")


def require_own(folder: Path, settings: Mapping[str, Any], *, kind: str, has_results: bool) -> None:
    """Begin a folder that is new; of one that is there, only require what ``begin_or_resume`` does.

    Raises:
        ConfigError, FingerprintError, DataError: As ``begin_or_resume``.
    """
    if not (folder / SETTINGS).exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(
                f"there is no {SETTINGS}, and other files are there",
                where=str(folder),
                why="they are not this command's, and would be mixed with its files",
                fix="pass another --output",
            )
        write_text(folder / SETTINGS, json.dumps(settings, indent=1) + "\n")
        return
    begun = read_settings_of(folder)
    if kind not in begun:
        raise ConfigError(
            f"its {SETTINGS} is not this command's",
            where=str(folder),
            why="it would be replaced, and with it what the other files there were made with",
            fix="pass another --output",
        )
    if not has_results:
        return
    different = [name for name in {**begun, **settings} if begun.get(name) != settings.get(name)]
    if different:
        said = ", ".join(
            f"{n} {_short(begun.get(n))} there, {_short(settings.get(n))} now" for n in different
        )
        raise FingerprintError(
            f"the folder was begun otherwise: {said}",
            where=str(folder),
            why="rows of both would stand in one folder as if they were made alike",
            fix="pass another --output, or the settings of the folder",
        )


def read_settings_of(folder: Path) -> dict[str, Any]:
    """What a folder was begun with.

    Raises:
        ConfigError: It is no such folder.
        DataError: Its settings cannot be read.
    """
    path = folder / SETTINGS
    if not path.is_file():
        raise ConfigError(
            f"{quoted(folder)} has no {SETTINGS}",
            why="without it nobody knows how its completions were made",
            fix="pass a folder that `dpo-opt sample` wrote",
        )
    try:
        found = json_of(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"not readable as JSON ({first_line(error)})", where=str(path), fix="make the folder again"
        ) from error
    if not isinstance(found, dict):
        raise DataError("not a JSON object", where=str(path), fix="make the folder again")
    return found


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
