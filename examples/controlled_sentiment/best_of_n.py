"""Best-of-N: of N samples of the reference the one that the learned reward prefers. Nothing is trained."""

from pathlib import Path

import numpy as np
import polars as pl
from points import Point

from dpo_opt.optimize.reward_model import RewardModel


def best_of_n(samples: pl.DataFrame, reward_model: Path, ns: list[float], *, seed: int) -> list[Point]:
    """The points of Best-of-N on the reference's own samples.

    Args:
        samples: Rated samples, those of a prompt next to each other, with a number of samples per prompt that
            every N divides. The groups of N are disjoint.
        reward_model: Folder of the model that selects; the ground truth then says how good the selected are.
        ns: The values of N.
        seed: Of the repetition.

    Returns:
        A point for each N. Its KL is log N - (N - 1) / N, an upper bound (Beirami et al. 2024, arXiv
        2401.01879, theorem 1).
    """
    ids = [
        np.array([*prompt, *completion], dtype=np.int32)
        for prompt, completion in zip(samples["prompt_ids"], samples["completion_ids"], strict=True)
    ]
    learned = np.array(RewardModel(reward_model, dtype="float32").rewards(ids))
    truth = samples["reward"].to_numpy()
    prompts = samples["prompt_id"].n_unique()
    found = []
    for n in map(int, ns):
        groups = learned.reshape(-1, n)
        best = groups.argmax(axis=1) + np.arange(len(groups)) * n
        reward = truth[best].reshape(prompts, -1).mean(axis=1)
        kl = np.full(prompts, np.log(n) - (n - 1) / n)
        found.append(Point("best_of_n", float(n), seed, n, kl, reward))
    return found
