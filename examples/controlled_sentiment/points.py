"""Measures policies: the ground-truth reward of their own samples, and their KL from the reference.

Every policy gets the same prompts, the same number of samples of each, and the same seed of a repetition.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
from folders import Work
from runs import Policy
from settings import Split

from dpo_opt.analysis import scan_kl_samples
from dpo_opt.commands.kl import KLConfig
from dpo_opt.kl.measure import measure_kl
from dpo_opt.user_function import UserFunction

FloatArray = npt.NDArray[np.float64]


class Point(NamedTuple):
    """One policy, measured."""

    method: str
    knob: float | None
    seed: int
    step: int
    """Updates; N for Best-of-N, which has none."""
    kl: FloatArray
    """(prompts,) Mean over a prompt's samples, in nats per completion: the exact KL of the next-token
    distributions, summed over the tokens that the policy sampled."""
    reward: FloatArray
    """(prompts,) Mean over a prompt's samples."""


def measure(work: Work, policy: Policy, split: str, reward: UserFunction) -> Point:
    """Sample a policy's completions on a split's prompts, unless they are there, and rate them."""
    run = policy.run
    table = work.of_seed(run.seed) / split / f"{run.name}_step={policy.step}.parquet"
    sample_policy(work, policy.folder, split, run.seed, table)
    found = by_prompt(rated(table, reward))
    return Point(
        run.method, run.knob, run.seed, policy.step, found["kl"].to_numpy(), found["reward"].to_numpy()
    )


def measure_reference(work: Work, seed: int, reward: UserFunction) -> tuple[Point, pl.DataFrame]:
    """The reference itself on the held-out prompts: its point, at a KL of 0, and its rated samples."""
    table = work.of_seed(seed) / "held_out" / "reference.parquet"
    sample_policy(work, Path(work.model), "held_out", seed, table)
    samples = rated(table, reward)
    found = by_prompt(samples)
    return Point("sft", None, seed, 0, np.zeros(len(found)), found["reward"].to_numpy()), samples


def sample_policy(work: Work, model: Path, split: str, seed: int, table: Path) -> None:
    """Write the samples of a model on a split's prompts, with both models' log-probs."""
    size: Split = getattr(work.experiment, split)
    measure_kl(
        KLConfig(
            models=[str(model)],
            reference=work.model,
            prompts=work.prompts(split),
            output=table,
            num_prompts=size.prompts,
            num_samples=size.samples,
            max_new_tokens=work.experiment.max_new_tokens,
            backend=work.experiment.backend,
            dtype="float32",
            seed=seed,
        )
    )


def rated(table: Path, reward: UserFunction) -> pl.DataFrame:
    """Samples with their ``reward`` and ``kl``, by prompt and number."""
    samples = (
        scan_kl_samples(table)
        .select(
            "prompt_id", "sample", "prompt", "completion", "prompt_ids", "completion_ids",
            kl=pl.col("token_kl").cast(pl.List(pl.Float64)).list.sum(),
        )
        .sort("prompt_id", "sample")
        .collect()
    )  # fmt: skip
    rewards = reward(samples["prompt"].to_list(), samples["completion"].to_list())
    return samples.with_columns(reward=pl.Series(rewards, dtype=pl.Float64))


def by_prompt(samples: pl.DataFrame) -> pl.DataFrame:
    """The mean ``reward`` and ``kl`` of each prompt."""
    return samples.group_by("prompt_id", maintain_order=True).agg(pl.mean("reward", "kl"))


def write_points(file: Path, points: Sequence[Point]) -> None:
    """Write the table of all points, a row each."""
    from dpo_opt.schemas.storage import publish

    rows = [point._asdict() | {"kl": point.kl.tolist(), "reward": point.reward.tolist()} for point in points]
    with publish(file) as private:
        pl.DataFrame(rows, infer_schema_length=None).write_parquet(private)
