"""Imports the scripts of an example, which are files of one folder and no package."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


@contextmanager
def scripts_of(folder: Path) -> Iterator[Callable[[str], ModuleType]]:
    """Import files of the folder by their names; they are forgotten in the end."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    yield importlib.import_module
    sys.path.remove(str(folder))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]
