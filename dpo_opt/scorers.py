"""Which engine runs a frozen model: the one place that knows both."""

from pathlib import Path
from typing import Literal, Protocol

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.plan import resolve_reference
from dpo_opt.precompute.vllm_model import VllmModel, prepare_environment, vllm_version
from dpo_opt.schemas.pairs import Sampler, Scorer

Backend = Literal["auto", "vllm", "hf"]


class Engine(Scorer, Sampler, Protocol):
    """A frozen model that scores and samples."""


def make_engine(folder: Path, *, backend: Backend, dtype: str, max_length: int) -> Engine:
    """vLLM where it is asked for, or installed and nothing else was asked for; else transformers.

    Raises:
        ConfigError: vLLM is asked for and is not there.
    """
    if backend == "vllm" or (backend == "auto" and vllm_version() is not None):
        prepare_environment()
        return VllmModel(folder, dtype=dtype, max_length=max_length)
    from dpo_opt.optimize.score import HfScorer

    return HfScorer(folder, dtype=dtype)


def make_scorer(config: PrecomputeConfig) -> Scorer:
    """The reference of a precompute run.

    Raises:
        ConfigError: The model or the engine is not there.
    """
    reference = resolve_reference(config)
    return make_engine(
        reference.folder, backend=config.backend, dtype=reference.dtype, max_length=reference.max_length
    )
