"""Reads the settings that a run was made with, as training recorded them in ``config.resolved.yaml``."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from dpo_opt.schemas.errors import ConfigError, DataError
from dpo_opt.schemas.plain_data import is_number, yaml_of
from dpo_opt.schemas.run_layout import CONFIG


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


_SETTINGS: Mapping[str, tuple[str, Callable[..., bool]]] = {
    "model": ("the folder or name of a model", _is_text),
    "beta": ("a number above 0", lambda value: is_number(value) and 0 < value <= sys.float_info.max),
    "loss_type": ("a loss or a list of losses", lambda value: _is_text(value) or _is_texts(value)),
    "eval_split": ("a share of at least 0 and below 1", lambda value: is_number(value) and 0 <= value < 1),
    "eval_shards": ("a list of folders", _is_texts),
}
"""Of the settings that more is made of than words on a page: what they are, and whether a value is that."""


def read_run_config(path: Path) -> Mapping[str, object]:
    """The settings that a run was made with.

    A setting that is read here or later is what ``dpo-opt train`` writes, or not there.

    Raises:
        ConfigError: It is not a run folder, names no shards, or a setting is of another kind.
        DataError: The file is damaged.
    """
    file = path / CONFIG
    if not file.is_file():
        raise ConfigError(
            f"there is no {CONFIG}" if path.is_dir() else "there is no such folder",
            where=str(path),
            why="this is not a folder that training wrote",
            fix="pass the folder that `dpo-opt train` had as its --output-dir",
        )
    try:
        config = yaml_of(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            "not readable as YAML",
            where=str(file),
            why="it names the run's shards and its beta",
            fix="mend the file; `dpo-opt train --dry-run` with the run's options shows what stood there",
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("shards"), str):
        raise ConfigError(
            "the run's configuration names no shards",
            where=str(file),
            why="without the reference log-probs there is nothing to compare the policy with",
            fix="add a line with the folder of shards that the run was trained on: `shards: FOLDER`",
        )
    for name, (kind, fits) in _SETTINGS.items():
        if (value := config.get(name)) is not None and not fits(value):
            raise ConfigError(
                f"{name} is {value!r:.50}, not {kind}",
                where=str(file),
                why="what is said of the run is computed with it",
                fix=f"write the {name} there that the run was trained with",
            )
    return config


def losses_in_words(recorded: object) -> str | None:
    """A run's ``loss_type`` as its settings record it; several as their sum."""
    if recorded is None:
        return None
    return " + ".join(map(str, recorded)) if isinstance(recorded, list) else str(recorded)
