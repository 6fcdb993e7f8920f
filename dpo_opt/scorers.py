"""Which engine runs a frozen model: the one place that knows both."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.engine.option_rules import read_engine_options
from dpo_opt.precompute.engine.vllm_build import is_cpu_build, prepare_environment, vllm_version
from dpo_opt.precompute.engine.vllm_model import ReuseCheck, VllmModel
from dpo_opt.precompute.shards.reference import resolve_reference
from dpo_opt.schemas.counts import counted
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.pairs import Sampler, Scorer

Backend = Literal["auto", "vllm", "hf"]


class Engine(Scorer, Sampler, Protocol):
    """A frozen model that scores and samples."""


def make_engine(
    folder: Path,
    *,
    backend: Backend,
    dtype: str,
    max_length: int,
    engine_options: Mapping[str, Any] = MappingProxyType({}),
) -> Engine:
    """vLLM where it is asked for, or installed and nothing else was asked for; else transformers.

    Raises:
        ConfigError: vLLM is asked for and is not there, or an engine gets options that it does not have.
    """
    if runs_vllm(backend):
        prepare_environment()
        return VllmModel(folder, dtype=dtype, max_length=max_length, engine_options=engine_options)
    if engine_options:
        raise ConfigError(
            f"--engine-option {next(iter(engine_options))}: the backend hf has no such options",
            why="they are arguments of vLLM's engine, and would have no effect",
            fix="leave them out, or pass --backend vllm",
        )
    from dpo_opt.optimize.transformers_scorer import HfScorer

    return HfScorer(folder, dtype=dtype, max_length=max_length)


def runs_vllm(backend: Backend) -> bool:
    """Whether ``make_engine`` takes vLLM."""
    return backend == "vllm" or (backend == "auto" and vllm_version() is not None)


def make_scorer(config: PrecomputeConfig) -> Scorer:
    """The reference of a precompute run.

    Raises:
        ConfigError: The model or the engine is not there, or an engine option is refused.
    """
    options = read_engine_options(config.engine_option)
    _require_the_gpus(config, options)
    reference = resolve_reference(config)
    return make_engine(
        reference.folder,
        backend=_scoring_backend(config, options),
        dtype=reference.dtype,
        max_length=reference.max_length,
        engine_options=options,
    )


def _scoring_backend(config: PrecomputeConfig, options: Mapping[str, Any]) -> Backend:
    """vLLM where it runs on a GPU; on CPU cores transformers scores faster (bench/precompute.py)."""
    if config.backend == "auto" and is_cpu_build() and not options:
        return "hf"
    return config.backend


def reuse_check(scorer: Scorer) -> dict[str, Any] | None:
    """What a run measured between scoring with and without the prefix cache; None where it was not used."""
    found: ReuseCheck | None = getattr(scorer, "reuse_check", None)
    return None if found is None else found._asdict()


def _require_the_gpus(config: PrecomputeConfig, options: Mapping[str, Any]) -> None:
    """Refuse an engine that a launched worker could not hold.

    Raises:
        ConfigError: It asks for more GPUs than each worker gets.
    """
    needed, given = options.get("tensor_parallel_size", 1), config.gpus_per_worker
    if config.launched and 0 < given < needed:
        raise ConfigError(
            f"--engine-option tensor_parallel_size={needed}: each worker gets {counted(given, 'GPU')}",
            why="its engine would look for the others where there are none",
            fix=f"pass --gpus-per-worker {needed}",
        )
