"""What training did to every pair: final log-probs per pair, and tables of accuracy, source, length, hardest.

Accuracy alone says little: a policy may find the chosen completion likelier in most pairs because its
reference already did. So each table gives the reference's own ranking next to the policy's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from dpo_opt.analysis import rewards
from dpo_opt.analysis.intervals import IntArray, Interval, cluster_starts, ratio_interval, share_interval
from dpo_opt.analysis.slices import ShardSlice

GROUPS = 65_536
_MOST_SINGLE = 1_000_000


class Outcome(NamedTuple):
    """Results for a set of pairs; intervals are over prompts."""

    pairs: int
    prompts: int
    reward_accuracy: Interval
    ranking_accuracy: Interval
    reference_ranking_accuracy: Interval
    flipped_right: float
    """Share of pairs that the reference ranks wrongly and the policy correctly."""
    flipped_wrong: float
    """Share of pairs that the reference ranks correctly and the policy wrongly."""
    mean_margin: float
    mean_chosen_logratio: float
    """In nats per completion."""
    mean_rejected_logratio: float
    chosen_fell: float
    """Share of pairs whose chosen completion became less likely."""
    rejected_fell: float
    fell_without_margin: float
    """Share of pairs whose chosen completion fell, and at least as far as the rejected one."""
    within_noise: int | None
    """Pairs whose margin is of the size of rounding, so that its sign says nothing; None if not known."""


class SourceOutcome(NamedTuple):
    """Results for the pairs of one source."""

    source: str | None
    pairs: int
    prompts: int
    reward_accuracy: Interval
    ranking_accuracy: Interval
    reference_ranking_accuracy: Interval
    mean_margin: float


class LengthGroup(NamedTuple):
    """Results for the pairs whose chosen completion is longer, shorter, or as long as the rejected one."""

    name: str
    pairs: int
    reward_accuracy: float
    reference_ranking_accuracy: float
    mean_margin: float


class LengthBias(NamedTuple):
    """How preference and margin depend on length."""

    longer_chosen: float
    """Share of pairs of unequal length whose longer completion is the chosen one."""
    unequal_pairs: int
    correlation: float | None
    """Pearson's r of margin and length difference in tokens; None if one of them does not vary."""
    groups: list[LengthGroup]


def reference_accuracy(slices: Sequence[ShardSlice]) -> float | None:
    """Share of all kept pairs that the reference ranks correctly; None without pairs."""
    right = rewards.reference_ranking_accuracy()
    sums = [
        s.reference.select(right.sum().alias("right"), pl.len().alias("pairs")).collect(engine="streaming")
        for s in slices
    ]
    pairs = sum(frame["pairs"].item() for frame in sums)
    return sum(frame["right"].item() for frame in sums) / pairs if pairs else None


def outcome(pairs: pl.LazyFrame, *, beta: float, noise: float | None = None) -> Outcome | None:
    """Summarize final pairs; None if there are none.

    Args:
        pairs: From ``final_pairs``.
        beta: The run's beta.
        noise: Standard deviation of rounding in a pair's log-prob margin, in nats. Margins below twice it
            are counted as ``within_noise``.
    """
    policy, reference = rewards.ranking_accuracy(), rewards.reference_ranking_accuracy()
    means = pairs.select(
        pl.len().alias("pairs"),
        flipped_right=(policy & ~reference).mean(),
        flipped_wrong=(~policy & reference).mean(),
        mean_margin=rewards.margin(beta=beta).mean(),
        mean_chosen_logratio=rewards.chosen_logratio().mean(),
        mean_rejected_logratio=rewards.rejected_logratio().mean(),
        chosen_fell=rewards.chosen_fell().mean(),
        rejected_fell=rewards.rejected_fell().mean(),
        fell_without_margin=(rewards.chosen_fell() & ~rewards.accuracy()).mean(),
        within_noise=pl.lit(None)
        if noise is None
        else (rewards.margin(beta=1.0).abs() < 2 * noise).sum().cast(pl.Int64),
    )
    found = means.collect(engine="streaming").row(0, named=True)
    if not found["pairs"]:
        return None
    prompts, (reward_accuracy, ranking_accuracy, reference_accuracy) = shares_over_prompts(
        pairs, rewards.accuracy(), policy, reference
    )
    return Outcome(
        prompts=prompts,
        reward_accuracy=reward_accuracy,
        ranking_accuracy=ranking_accuracy,
        reference_ranking_accuracy=reference_accuracy,
        **found,
    )


def shares_over_prompts(
    pairs: pl.LazyFrame | pl.DataFrame, *conditions: pl.Expr
) -> tuple[int, list[Interval]]:
    """The number of prompts, and the share of the pairs for which each condition holds.

    Of more than a million pairs the prompts are counted to about 1%. A cluster then is a group of prompts
    that their hash decides: with 65,536 of them the intervals keep their width to 1%, and memory is bounded
    (random groups: Wolter 2007, "Introduction to Variance Estimation", chapter 2).

    Args:
        pairs: At least one pair, with ``prompt`` (a hash of prompt_id) and the columns of the conditions.
        conditions: True or False for each pair.
    """
    pairs = pairs.lazy()
    clusters = _cluster_sums(pairs, conditions)
    return _prompts(pairs, clusters)[None], _shares(clusters)


def cluster(pairs: pl.LazyFrame) -> pl.Expr:
    """What is drawn as one when pairs are resampled: their prompt, or its group if the pairs are many."""
    many = pairs.select(pl.len()).collect(engine="streaming").item() > _MOST_SINGLE
    prompt = pl.col("prompt")
    return (prompt % GROUPS if many else prompt).alias("cluster")


def means_over_prompts(pairs: pl.DataFrame, *values: pl.Expr) -> list[Interval]:
    """The mean of each value over the pairs, with its interval over prompts; NaN without pairs.

    Args:
        pairs: With ``prompt`` and the columns of the values.
        values: A number for each pair.
    """
    pairs = pairs.sort("prompt")
    starts = cluster_starts(pairs["prompt"].to_numpy())
    sizes = np.diff(starts, append=len(pairs)).astype(np.float64)

    def mean(value: pl.Expr) -> Interval:
        numbers = pairs.select(value.cast(pl.Float64).alias("value"))["value"].to_numpy()
        sums = np.add.reduceat(numbers, starts) if len(pairs) else sizes
        return ratio_interval(numerators=sums, denominators=sizes)

    return [mean(value) for value in values]


def means_by_source(pairs: pl.LazyFrame, *values: pl.Expr) -> pl.DataFrame:
    """Number of pairs and means of values per source, largest first; empty if no pair has a source."""
    table = (
        pairs.group_by(pl.col("source").cast(pl.String))
        .agg(pl.len().alias("pairs"), *(value.mean() for value in values))
        .sort("pairs", "source", descending=[True, False])
        .collect(engine="streaming")
    )
    return table.clear() if table["source"].null_count() == len(table) else table


def by_source(pairs: pl.LazyFrame | pl.DataFrame, *, beta: float) -> list[SourceOutcome]:
    """One outcome per source, largest first; empty if no pair has a source."""
    pairs = pairs.lazy().with_columns(pl.col("source").cast(pl.String))
    table = means_by_source(pairs, rewards.margin(beta=beta).alias("mean_margin"))
    if table.is_empty():
        return []
    clusters = _cluster_sums(
        pairs,
        (rewards.accuracy(), rewards.ranking_accuracy(), rewards.reference_ranking_accuracy()),
        by=("source",),
    )
    prompts = _prompts(pairs, clusters, by="source")
    shares = {of["source"][0]: _shares(of.drop("source")) for of in clusters.partition_by("source")}
    found = []
    for source, count, mean_margin in table.select("source", "pairs", "mean_margin").iter_rows():
        right, ranked, reference = shares[source]
        found.append(SourceOutcome(source, count, prompts[source], right, ranked, reference, mean_margin))
    return found


def length_bias(pairs: pl.LazyFrame, *, beta: float) -> LengthBias:
    """How often the longer completion is chosen, and how the margin depends on length."""
    difference, margin = rewards.length_difference(), rewards.margin(beta=beta)
    correlation = (
        pairs.select(pl.corr(margin, difference.cast(pl.Float64))).collect(engine="streaming").item()
    )
    names = {1: "longer", -1: "shorter", 0: "as long"}
    table = (
        pairs.group_by(difference.sign().alias("sign"))
        .agg(
            pl.len().alias("pairs"),
            rewards.accuracy().mean().alias("reward_accuracy"),
            rewards.reference_ranking_accuracy().mean().alias("reference_ranking_accuracy"),
            margin.mean().alias("mean_margin"),
        )
        .collect(engine="streaming")
        .rows_by_key("sign", named=True, unique=True)
    )
    groups = [LengthGroup(name=name, **table[sign]) for sign, name in names.items() if sign in table]
    count = {sign: table[sign]["pairs"] if sign in table else 0 for sign in names}
    unequal = count[1] + count[-1]
    return LengthBias(
        longer_chosen=count[1] / unequal if unequal else float("nan"),
        unequal_pairs=unequal,
        correlation=correlation if correlation is not None and correlation == correlation else None,
        groups=groups,
    )


def _share(right: IntArray, pairs: IntArray) -> Interval:
    # Most prompts have equal counts, so a million prompts have only dozens of distinct ones.
    base = int(pairs.max()) + 1
    distinct, counts = np.unique(pairs * base + right, return_counts=True)
    trials, successes = np.divmod(distinct, base)
    return share_interval(
        successes=successes.astype(np.float64), trials=trials.astype(np.float64), multiplicities=counts
    )


def _cluster_sums(
    pairs: pl.LazyFrame, conditions: Sequence[pl.Expr], *, by: Sequence[str] = ()
) -> pl.DataFrame:
    """``cluster``, ``pairs`` and the number of pairs for which each condition holds."""
    return (
        pairs.group_by(*by, cluster(pairs))
        .agg(
            pl.len().cast(pl.Int64).alias("pairs"),
            *(holds.sum().cast(pl.Int64).alias(f"holds {i}") for i, holds in enumerate(conditions)),
        )
        .collect(engine="streaming")
    )


def _shares(clusters: pl.DataFrame) -> list[Interval]:
    sizes = clusters["pairs"].to_numpy()
    return [_share(clusters[name].to_numpy(), sizes) for name in clusters.columns if name.startswith("holds")]


def _prompts(pairs: pl.LazyFrame, clusters: pl.DataFrame, *, by: str | None = None) -> dict[str | None, int]:
    """Number of prompts by the value of a column, or of all under None."""
    group = pl.lit(None, pl.String) if by is None else pl.col(by)
    grouped = clusters["pairs"].sum() > _MOST_SINGLE
    counted = (
        pairs.group_by(group.alias("of")).agg(pl.col("prompt").approx_n_unique()).collect(engine="streaming")
        if grouped
        else clusters.group_by(group.alias("of")).agg(pl.len().alias("prompt"))
    )
    return dict(counted.select("of", "prompt").iter_rows())
