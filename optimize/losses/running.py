"""What losses know of the training steps so far: small, explicit, and a part of every checkpoint."""

from pydantic import BaseModel, ConfigDict
from torch import Tensor

_MOMENTUM = 0.9
"""Of the moving averages: that of beta-DPO's paper."""


class Running(BaseModel):
    """The rewards of the training steps so far, in a few numbers; the same on every process.

    It is made of all of a step's rewards at once, so micro-batches and processes do not change it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = 0
    """Steps that were counted."""
    completions: int = 0
    """Completions of their pairs."""
    reward: float = 0.0
    """Mean reward of these completions."""
    margin: float = 0.0
    """Moving average, from 0 on, of the mean margin of each step."""
    spread: float = 0.0
    """Moving average, from 0 on, of the standard deviation of the margins in each step."""

    def after(self, chosen_rewards: Tensor, rejected_rewards: Tensor) -> "Running":
        """With one more step.

        Args:
            chosen_rewards: (pairs,) of all pairs of the step.
            rejected_rewards: (pairs,)
        """
        margins = chosen_rewards - rejected_rewards
        completions = self.completions + 2 * len(margins)
        total = float((chosen_rewards + rejected_rewards).sum())
        return Running(
            steps=self.steps + 1,
            completions=completions,
            reward=self.reward + (total - 2 * len(margins) * self.reward) / completions,
            margin=_moved(self.margin, float(margins.mean())),
            spread=_moved(self.spread, float(margins.std(correction=min(1, len(margins) - 1)))),
        )


def _moved(average: float, value: float) -> float:
    return _MOMENTUM * average + (1 - _MOMENTUM) * value
