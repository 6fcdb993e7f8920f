"""Which engine scores: the one place that knows both."""

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.plan import resolve_reference
from dpo_opt.precompute.vllm_model import VllmModel, prepare_environment, vllm_version
from dpo_opt.schemas.pairs import Scorer


def make_scorer(config: PrecomputeConfig) -> Scorer:
    """vLLM where it is asked for, or installed and nothing else was asked for; else transformers.

    Raises:
        ConfigError: The model or the engine is not there.
    """
    reference = resolve_reference(config)
    if config.backend == "vllm" or (config.backend == "auto" and vllm_version() is not None):
        prepare_environment()
        return VllmModel(reference.folder, dtype=reference.dtype, max_length=reference.max_length)
    from dpo_opt.optimize.score import HfScorer

    return HfScorer(reference.folder, dtype=reference.dtype)
