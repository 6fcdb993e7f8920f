"""Folders that ``datasets.save_to_disk`` wrote: ``state.json`` says which of the files hold the rows.

Others beside them, such as ``cache-*.arrow``, hold what a later ``map`` or ``filter`` made of the rows.
"""

import json
from collections.abc import Callable, Sequence
from typing import BinaryIO

from dpo_opt.schemas.errors import DataError

_STATE = "/state.json"
_SUFFIX = ".arrow"


def only_saved(files: Sequence[str], listed: Sequence[str], opened: Callable[[str], BinaryIO]) -> list[str]:
    """Data files without the Arrow files that no saved dataset names, in the order of those that it names.

    Args:
        files: Data files of a folder, by name.
        listed: All files of the folder.
        opened: Opens a file.

    Raises:
        DataError: A saved dataset's record cannot be read, or names a file that is not there.
    """
    folders = {file.rpartition("/")[0] for file in files if file.endswith(_SUFFIX)}
    named = {
        state.removesuffix(_STATE): _named(state, set(files), opened)
        for state in listed
        if state.endswith(_STATE) and state.removesuffix(_STATE) in folders
    }
    found: list[str] = []
    for file in files:
        folder = file.rpartition("/")[0]
        if folder not in named or not file.endswith(_SUFFIX):
            found.append(file)
        elif folder in folders:
            folders.remove(folder)
            found += named[folder]
    return found


def _named(state: str, files: set[str], opened: Callable[[str], BinaryIO]) -> list[str]:
    try:
        with opened(state) as handle:
            record = json.loads(handle.read())
        names = [part["filename"] for part in record["_data_files"]]
        indices = record.get("_indices_data_files")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            "not readable as the record of a saved dataset",
            where=state,
            why="nothing else says which Arrow files beside it hold the rows, and in which order",
            fix="save the dataset again, or name the files that are meant",
            kind="unreadable_file",
        ) from error
    if indices:
        raise DataError(
            "the dataset was saved with a list of the rows that count",
            where=state,
            why="early versions of datasets wrote it; the files themselves hold other rows too",
            fix="save it again: load_from_disk(OLD).flatten_indices().save_to_disk(NEW)",
            kind="unreadable_file",
        )
    folder = state.removesuffix(_STATE)
    missing = next((name for name in names if f"{folder}/{name}" not in files), None)
    if missing is not None:
        raise DataError(
            f"the saved dataset's file {json.dumps(missing)[:80]} is not there",
            where=state,
            why="its rows would be left out",
            fix="copy the folder again",
            kind="unreadable_file",
        )
    return [f"{folder}/{name}" for name in names]
