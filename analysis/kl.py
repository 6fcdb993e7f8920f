"""Estimates KL(policy || reference) from samples of the policy: how far the policy moved from the reference.

The KL is the policy's expectation of log policy - log reference, so it needs the policy's own samples. The
mean log-ratio on dataset completions looks similar but is not a KL; it may even have the other sign.
"""

from typing import NamedTuple

import polars as pl

from dpo_opt.analysis.intervals import Interval, ratio_interval, share_interval
from dpo_opt.schemas.errors import DataError, quoted


class KLEstimate(NamedTuple):
    """KL(policy || reference) in nats, estimated from samples; intervals are over prompts."""

    samples: int
    prompts: int
    tokens: int
    unfinished: Interval
    """Share of samples that the token limit cut off. For these the KL covers only the sampled part."""
    k1_sequence: Interval
    """Per completion: mean over samples of the summed log-ratio. Unbiased."""
    k1_token: Interval
    """Per token: the sum of all log-ratios divided by the number of tokens."""
    k3_token: Interval
    """Per token: exp(-r) - 1 + r with r the token's log-ratio. Unbiased, never negative, less noisy than
    k1 while the models are close (Schulman 2020, "Approximating KL divergence")."""


def estimate_kl(samples: pl.LazyFrame) -> KLEstimate:
    """Estimate the KL from a table of on-policy samples (``scan_kl_samples``).

    Raises:
        DataError: The table is empty, or a sample's two lists of log-probs differ in length.
    """
    policy, ref = pl.col("policy_token_logps"), pl.col("ref_token_logps")
    uneven = samples.filter(policy.list.len() != ref.list.len()).select("prompt_id", "sample").head(1)
    if len(found := uneven.collect(engine="streaming")):
        prompt_id, sample = found.row(0)
        raise DataError(
            f"sample {sample} of prompt {quoted(prompt_id)} has different numbers of policy and reference "
            "log-probs",
            fix="dpo-opt kl --model CKPT --reference M --prompts DIR_OR_DATA --output FILE.parquet",
        )
    # In float64, because k3 is a small difference of numbers near 1.
    logratio = policy.cast(pl.List(pl.Float64)) - ref.cast(pl.List(pl.Float64))
    by_prompt = (
        samples.select("prompt_id", "finished", logratio.alias("logratio"))
        .with_columns(
            tokens=pl.col("logratio").list.len(),
            k1=pl.col("logratio").list.sum(),
            k3=pl.col("logratio").list.eval((-pl.element()).exp() - 1 + pl.element()).list.sum(),
        )
        .group_by("prompt_id")
        .agg(
            pl.len().alias("samples"), (~pl.col("finished")).sum().alias("cut"), pl.sum("tokens", "k1", "k3")
        )
        .collect(engine="streaming")
    )
    if not len(by_prompt):
        raise DataError("the table of on-policy samples is empty")
    sums = {name: by_prompt[name].cast(pl.Float64).to_numpy() for name in by_prompt.columns[1:]}
    return KLEstimate(
        samples=int(by_prompt["samples"].sum()),
        prompts=len(by_prompt),
        tokens=int(by_prompt["tokens"].sum()),
        unfinished=share_interval(successes=sums["cut"], trials=sums["samples"]),
        k1_sequence=ratio_interval(numerators=sums["k1"], denominators=sums["samples"]),
        k1_token=ratio_interval(numerators=sums["k1"], denominators=sums["tokens"]),
        k3_token=ratio_interval(numerators=sums["k3"], denominators=sums["tokens"]),
    )
