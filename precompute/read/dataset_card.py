"""The splits that a dataset's card names: ``configs`` in the YAML at the head of its README.md.

Described in the Hub's documentation, "Manual configuration" of datasets.
"""

import io
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import BinaryIO

from dpo_opt.schemas.plain_data import yaml_of

_FENCE = "---"


def splits_of_card(
    folder: str, files: Sequence[str], opened: Callable[[str], BinaryIO]
) -> dict[str, tuple[str, list[str]]]:
    """The splits of some files.

    Args:
        folder: Path or URL of a dataset, with its README.md; patterns of files are relative to it.
        files: Data files.
        opened: Opens a file.

    Returns:
        Name of a split to what names all of its files, the only pattern of the card or "", and the files. Of
        several configurations, a split is called ``CONFIGURATION/SPLIT``. Empty where the card names none.
    """
    root = f"{folder.rstrip('/')}/"
    inside = [file for file in files if file.startswith(root)]
    found: dict[str, tuple[str, list[str]]] = {}
    for name, patterns in _patterns(f"{root}README.md", opened):
        own = [f for f in inside if any(fnmatchcase(f.removeprefix(root), pattern) for pattern in patterns)]
        if own:
            found[name] = (f"{root}{patterns[0]}" if len(patterns) == 1 else "", own)
    return found


def _patterns(card: str, opened: Callable[[str], BinaryIO]) -> list[tuple[str, list[str]]]:
    try:
        with opened(card) as file:
            text = io.TextIOWrapper(file, encoding="utf-8").read()
        head, fence, rest = text.partition(f"{_FENCE}\n")
        about = yaml_of(rest.partition(f"\n{_FENCE}")[0]) if fence and not head.strip() else None
    except (OSError, ValueError):
        return []  # a card that cannot be read names nothing
    configs = about.get("configs") if isinstance(about, dict) else None
    configs = [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []
    found = []
    for config in configs:
        parts = config.get("data_files")
        for part in parts if isinstance(parts, list) else []:
            if not isinstance(part, dict) or not isinstance(part.get("split"), str):
                continue
            path = part.get("path")
            patterns = [p for p in (path if isinstance(path, list) else [path]) if isinstance(p, str)]
            name = f"{config.get('config_name')}/{part['split']}" if len(configs) > 1 else part["split"]
            found.append((name, patterns))
    return found
