"""Dataset to tokenized pairs to reference log-probs to shards."""

from typing import TYPE_CHECKING, Any

from dpo_opt.precompute.config import PrecomputeConfig

if TYPE_CHECKING:
    from dpo_opt.precompute.run import precompute

__all__ = ["PrecomputeConfig", "precompute"]


def __getattr__(name: str) -> Any:
    if name == "precompute":
        from dpo_opt.precompute.run import precompute

        return precompute
    raise AttributeError(name)
