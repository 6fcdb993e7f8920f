"""A vLLM engine in a process of its own, started by tests that look at many models."""

from pathlib import Path

from dpo_opt.precompute.engine.score_pairs import score_pairs
from dpo_opt.precompute.engine.vllm_model import VllmModel
from dpo_opt.schemas.pairs import ScoredPair, TokenizedPair


def score_in_vllm(folder: Path, pairs: list[TokenizedPair], longest: int) -> tuple[str, list[ScoredPair]]:
    """What the engine makes of the rotary embedding, and the pairs with its log-probs."""
    engine = VllmModel(folder, dtype="float32", max_length=longest)
    return engine.numerics.rope, score_pairs(pairs, engine).pairs
