"""Training, from cached reference log-probs to a trained policy: ``train`` with a ``TrainConfig``."""

from typing import TYPE_CHECKING, Any

from dpo_opt.optimize.config import TrainConfig

if TYPE_CHECKING:
    from dpo_opt.optimize.loop import train
    from dpo_opt.optimize.losses.preference_loss import preference_loss

__all__ = ["TrainConfig", "preference_loss", "train"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import, and reading a configuration does not need it.
    if name == "train":
        from dpo_opt.optimize.loop import train

        return train
    if name == "preference_loss":
        from dpo_opt.optimize.losses.preference_loss import preference_loss

        return preference_loss
    raise AttributeError(name)
