"""Estimates KL(policy || reference) from samples of the policy: how far the policy moved from the reference.

The KL is the policy's expectation of log policy - log reference, so it needs the policy's own samples. The
mean log-ratio on dataset completions looks similar but is not a KL; it may even have the other sign. So the
samples are tested before anything is called KL.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from dpo_opt.analysis.intervals import FloatArray, Interval, as_record, ratio_interval, share_interval
from dpo_opt.analysis.load import scan_kl_samples
from dpo_opt.analysis.run_files import finished_tables
from dpo_opt.analysis.table_checks import UNREADABLE
from dpo_opt.schemas.errors import DataError, first_line, quoted
from dpo_opt.schemas.kl_samples import read_kl_record
from dpo_opt.schemas.run_layout import KL

# By how much the samples' mean surprise per token may differ from the policy's entropy: a share of it, and
# standard errors. Rounding moves it by a thousandth; a temperature of 0.9 or a top-p of 0.95 by a tenth.
_SURPRISE_SHARE = 0.02
_SURPRISE_ERRORS = 5.0
FINAL_TABLE = "final.parquet"
_PER_TOKEN = ("ref_token_logps", "policy_token_entropies", "token_kl")
# By the names of their sums: what every sample has to have.
_NEEDED = {"cut": "finished", "tokens": "policy_token_logps", "k1": "ref_token_logps"}


def _again(where: str | None) -> str:
    """What replaces a table; one that is there is not measured again."""
    remove = "remove it" if where is None else f"rm {quoted(where)}"
    return f"{remove}, then measure again with `dpo-opt kl`"


class KLEstimate(NamedTuple):
    """KL(policy || reference) in nats, estimated from samples; intervals are over prompts.

    A sample's KL goes up to its end-of-sequence token, which counts, or to where the token limit cut it off.
    """

    samples: int
    prompts: int
    tokens: int
    unfinished: Interval
    """Share of samples that the token limit cut off. For these the KL covers only the sampled part."""
    k1_sequence: Interval
    """Per completion: mean over samples of the summed log-ratio. Unbiased."""
    k1_token: Interval
    """Per token: the sum of all log-ratios divided by the number of tokens."""
    k3_sequence: Interval
    """Per completion: mean over samples of the sum of the tokens' exp(-r) - 1 + r, with r the log-ratio.

    Unbiased, never negative, less noisy than k1 while the models are close (Schulman 2020, "Approximating KL
    divergence"). Where they are far apart, a few rare tokens carry it."""
    k3_token: Interval
    """Per token: the same sum divided by the number of tokens."""
    rb_sequence: Interval | None
    """Per completion: mean over samples of the sum of the exact KL of both next-token distributions.

    Rao-Blackwellised: unbiased, never negative, and never noisier than k1 (Amini et al., arXiv 2504.10637).
    None where the table does not have it."""
    rb_token: Interval | None
    """Per token: the same sum divided by the number of tokens."""

    @property
    def best(self) -> Interval:
        """The estimate per completion to quote: Rao-Blackwell's where there is one, else k1."""
        return self.rb_sequence or self.k1_sequence

    def as_record(self) -> dict[str, Any]:
        """Its fields as JSON has them."""
        return as_record(self._asdict())


class KLFile(NamedTuple):
    """One table of on-policy samples."""

    file: str
    """Its name."""
    step: int | None
    """Optimizer updates of the policy; None where the table does not say."""
    estimate: KLEstimate


def kl_of_run(run: Path) -> list[KLFile]:
    """The estimates of the tables in a run's folder ``kl/``, in the order of their steps; none without them.

    The checkpoint of the last step and the final model are one policy. Where both were measured, the final
    model's table stands for it.

    Raises:
        DataError: A table is damaged, or has samples of another model than the policy.
    """
    found = []
    for file in finished_tables(run / KL):
        estimate = estimate_kl(scan_kl_samples(file), where=str(file))
        record = read_kl_record(file)
        found.append(KLFile(file.name, None if record is None else record.step, estimate))
    last = {kl.step for kl in found if kl.file == FINAL_TABLE} - {None}
    once = [kl for kl in found if kl.file == FINAL_TABLE or kl.step not in last]
    return sorted(once, key=lambda kl: (math.inf if kl.step is None else kl.step, kl.file == FINAL_TABLE))


def estimate_kl(samples: pl.LazyFrame, *, where: str | None = None) -> KLEstimate:
    """Estimate the KL from a table of on-policy samples (``scan_kl_samples``).

    Args:
        samples: The table.
        where: Its name, for messages.

    Raises:
        DataError: The table is empty or damaged, a sample's lists of numbers differ in length or are not
            there, or the samples are not the policy's.
    """
    try:
        sums = _sums_by_prompt(samples, where)
    except UNREADABLE as error:
        raise DataError(
            f"the table of on-policy samples cannot be read ({first_line(error)})",
            where=where,
            why="another program changed it, or its disk did",
            fix=_again(where),
        ) from error
    if lacking := _NEEDED.keys() - sums.keys():
        raise DataError(
            f"a sample has no {', '.join(sorted(_NEEDED[name] for name in lacking))}",
            where=where,
            why="the mean of the others would be that of other samples",
            fix=_again(where),
        )
    if "entropy" in sums:
        _require_own_samples({name: float(sums[name].sum()) for name in sums}, where)

    def per(value: str, unit: str) -> Interval:
        return ratio_interval(numerators=sums[value], denominators=sums[unit])

    return KLEstimate(
        samples=int(sums["samples"].sum()),
        prompts=len(sums["samples"]),
        tokens=int(sums["tokens"].sum()),
        unfinished=share_interval(successes=sums["cut"], trials=sums["samples"]),
        k1_sequence=per("k1", "samples"),
        k1_token=per("k1", "tokens"),
        k3_sequence=per("k3", "samples"),
        k3_token=per("k3", "tokens"),
        rb_sequence=per("rb", "samples") if "rb" in sums else None,
        rb_token=per("rb", "tokens") if "rb" in sums else None,
    )


def _sums_by_prompt(samples: pl.LazyFrame, where: str | None) -> dict[str, FloatArray]:
    """Sums over the samples of each prompt, (prompts,) each; without those that a table does not have.

    Raises:
        DataError: See ``estimate_kl``.
    """
    # In float64, because k3 is a small difference of numbers near 1.
    samples = samples.with_columns(pl.col("policy_token_logps", *_PER_TOKEN).cast(pl.List(pl.Float64)))
    policy = pl.col("policy_token_logps")
    uneven = pl.any_horizontal(policy.list.len() != pl.col(name).list.len() for name in _PER_TOKEN)
    found = samples.filter(uneven).select("prompt_id", "sample").head(1).collect(engine="streaming")
    if len(found):
        prompt_id, sample = found.row(0)
        raise DataError(
            f"sample {sample} of prompt {quoted(prompt_id)} has different numbers of policy and reference "
            "log-probs",
            where=where,
            why="each token has one of both models",
            fix=_again(where),
        )
    logratio = pl.col("logratio").list
    by_prompt = (
        samples.with_columns(logratio=policy - pl.col("ref_token_logps"))
        .select(
            "prompt_id",
            cut=~pl.col("finished"),
            samples=1,
            tokens=policy.list.len(),
            k1=logratio.sum(),
            k3=logratio.eval((-pl.element()).exp() - 1 + pl.element()).list.sum(),
            rb=_sum("token_kl"),
            surprise=-policy.list.sum(),
            entropy=_sum("policy_token_entropies"),
        )
        .with_columns(gap_squared=(pl.col("surprise") - pl.col("entropy")) ** 2)
        .group_by("prompt_id")
        # A sum that left out samples without a value would be that of other samples.
        .agg(pl.when(pl.all().is_null().any()).then(None).otherwise(pl.all().sum()).name.keep())
        .sort("prompt_id")
        .collect(engine="streaming")
    )
    if not len(by_prompt) or not by_prompt["tokens"].sum():
        raise DataError(
            "the table of on-policy samples is empty",
            where=where,
            why="there is nothing to take a mean of",
            fix=_again(where),
        )
    known = (by_prompt[name] for name in by_prompt.columns[1:] if not by_prompt[name].null_count())
    return {column.name: column.cast(pl.Float64).to_numpy() for column in known}


def _sum(name: str) -> pl.Expr:
    # The sum of no list is no number in some releases of polars, and 0 in others.
    return pl.when(pl.col(name).is_not_null()).then(pl.col(name).list.sum())


def _require_own_samples(sums: Mapping[str, float], where: str | None) -> None:
    """Refuse samples that the policy would not write.

    Of a policy's own samples the log-prob of each token has minus the entropy as its mean, given all tokens
    before it. Greedy, truncated (top-p, top-k) and cooled sampling are less surprising, another model's
    samples are more so. Given the prompt, the differences of samples are independent, so that they need no
    clusters.

    Args:
        sums: Over all samples, of ``tokens``, ``surprise`` (minus the policy's log-probs), ``entropy`` and
            ``gap_squared`` (squared difference of a sample's two).
        where: Name of the table.

    Raises:
        DataError: The two means differ.
    """
    gap = (sums["surprise"] - sums["entropy"]) / sums["tokens"]
    error = math.sqrt(sums["gap_squared"]) / sums["tokens"]
    mean = sums["entropy"] / sums["tokens"]
    if abs(gap) <= max(_SURPRISE_ERRORS * error, _SURPRISE_SHARE * mean):
        return
    raise DataError(
        f"the samples are not the policy's: their tokens are {abs(gap):.3g} nats "
        f"{'more' if gap > 0 else 'less'} surprising than the {mean:.3g} that it expects of its own",
        where=where,
        why="the KL is a mean over what the policy itself samples at temperature 1",
        fix=_again(where),
    )
