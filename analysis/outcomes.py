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
from dpo_opt.analysis.load import ShardSlice, join_reference


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
    ranking_accuracy: float
    reference_ranking_accuracy: float
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
        s.shards.select(right.sum().alias("right"), pl.len().alias("pairs")).collect(engine="streaming")
        for s in slices
    ]
    pairs = sum(frame["pairs"].item() for frame in sums)
    return sum(frame["right"].item() for frame in sums) / pairs if pairs else None


def final_pairs(
    pair_logps: pl.LazyFrame, slices: Sequence[ShardSlice], *, held_out: pl.Series, where: str
) -> pl.DataFrame:
    """The final log-probs of each pair with the reference's: about 60 bytes per pair in memory.

    Args:
        pair_logps: At most one state of the policy; a pair that was scored twice is kept once.
        slices: From ``shard_slices``.
        held_out: Row numbers of the pairs that training did not see.
        where: Name of the pair log-probs, for messages.

    Returns:
        ``row``, ``prompt`` (a hash of prompt_id), ``source``, ``held_out``, the four log-probs and the
        two lengths.

    Raises:
        DataError: The pairs are not those of the shards.
    """
    # Hashed before the join: as text, the identifiers would take most of its memory.
    reference = (
        "row",
        "pair_id",
        pl.col("prompt_id").hash().alias("prompt"),
        pl.col("source").cast(pl.Categorical),
        "ref_chosen_logps",
        "ref_rejected_logps",
    )
    policy = ("row", "pair_id", "chosen_logps", "rejected_logps", "chosen_length", "rejected_length")
    parts = [
        join_reference(pair_logps.filter(s.rows).select(policy), s.shards.select(*reference), where=where)
        .drop("pair_id")
        .unique("row", keep="any")
        .sort("row")
        .collect(engine="streaming")
        for s in slices
    ]
    return pl.concat(parts).with_columns(pl.col("row").is_in(held_out.implode()).alias("held_out"))


def outcome(pairs: pl.DataFrame, *, beta: float, noise: float | None = None) -> Outcome:
    """Summarize final pairs.

    Args:
        pairs: From :func:`final_pairs`, at least one.
        beta: The run's beta.
        noise: Standard deviation of rounding in a pair's log-prob margin, in nats. Margins below twice it
            are counted as ``within_noise``.
    """
    policy, reference = rewards.ranking_accuracy(), rewards.reference_ranking_accuracy()
    means = pairs.lazy().select(
        flipped_right=(policy & ~reference).mean(),
        flipped_wrong=(~policy & reference).mean(),
        mean_margin=rewards.margin(beta=beta).mean(),
        mean_chosen_logratio=rewards.chosen_logratio().mean(),
        mean_rejected_logratio=rewards.rejected_logratio().mean(),
        chosen_fell=rewards.chosen_fell().mean(),
        rejected_fell=rewards.rejected_fell().mean(),
        fell_without_margin=(rewards.chosen_fell() & ~rewards.reward_accuracy()).mean(),
        within_noise=pl.lit(None)
        if noise is None
        else (rewards.margin(beta=1.0).abs() < 2 * noise).sum().cast(pl.Int64),
    )
    prompts, (reward_accuracy, ranking_accuracy, reference_accuracy) = shares_over_prompts(
        pairs, rewards.reward_accuracy(), policy, reference
    )
    return Outcome(
        pairs=len(pairs),
        prompts=prompts,
        reward_accuracy=reward_accuracy,
        ranking_accuracy=ranking_accuracy,
        reference_ranking_accuracy=reference_accuracy,
        **means.collect(engine="streaming").row(0, named=True),
    )


def shares_over_prompts(pairs: pl.DataFrame, *conditions: pl.Expr) -> tuple[int, list[Interval]]:
    """The number of prompts, and the share of the pairs for which each condition holds.

    Args:
        pairs: At least one pair, with ``prompt`` (a hash of prompt_id) and the columns of the conditions.
        conditions: True or False for each pair.
    """
    # numpy, because a hash table of a million prompts would outweigh the frame itself.
    prompts = pairs["prompt"].to_numpy()
    order = np.argsort(prompts)
    starts = cluster_starts(prompts[order])
    sizes = np.diff(starts, append=len(pairs))

    def share(condition: pl.Expr) -> Interval:
        values = pairs.select(condition.cast(pl.Int32).alias("holds"))["holds"].to_numpy()
        return _share(np.add.reduceat(values[order], starts), sizes)

    return len(starts), [share(condition) for condition in conditions]


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


def means_by_source(pairs: pl.DataFrame, *values: pl.Expr) -> pl.DataFrame:
    """Number of pairs and means of values per source, largest first; empty if no pair has a source."""
    if pairs["source"].null_count() == len(pairs):
        pairs = pairs.clear()
    return (
        pairs.lazy()
        .group_by("source")
        .agg(pl.len().alias("pairs"), *(value.mean() for value in values))
        .with_columns(pl.col("source").cast(pl.String))
        .sort("pairs", "source", descending=[True, False])
        .collect(engine="streaming")
    )


def by_source(pairs: pl.DataFrame, *, beta: float) -> list[SourceOutcome]:
    """One outcome per source, largest first; empty if no pair has a source."""
    table = means_by_source(
        pairs,
        rewards.reward_accuracy().alias("reward_accuracy"),
        rewards.ranking_accuracy().alias("ranking_accuracy"),
        rewards.reference_ranking_accuracy().alias("reference_ranking_accuracy"),
        rewards.margin(beta=beta).alias("mean_margin"),
    )
    accuracies = {} if table.is_empty() else _accuracies_by_source(pairs)
    return [
        SourceOutcome(**{**row, **accuracies[row["source"]]._asdict()}) for row in table.iter_rows(named=True)
    ]


def length_bias(pairs: pl.DataFrame, *, beta: float) -> LengthBias:
    """How often the longer completion is chosen, and how the margin depends on length."""
    difference, margin = rewards.length_difference(), rewards.margin(beta=beta)
    correlation = (
        pairs.lazy().select(pl.corr(margin, difference.cast(pl.Float64))).collect(engine="streaming").item()
    )
    names = {1: "longer", -1: "shorter", 0: "as long"}
    table = (
        pairs.lazy()
        .group_by(difference.sign().alias("sign"))
        .agg(
            pl.len().alias("pairs"),
            rewards.reward_accuracy().mean().alias("reward_accuracy"),
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


def hardest_pairs(pairs: pl.DataFrame, *, beta: float, count: int) -> pl.DataFrame:
    """The pairs with the lowest final margin, lowest first, with ``margin`` and both ranking margins."""
    return (
        pairs.lazy()
        .with_columns(
            margin=rewards.margin(beta=beta),
            ranking_margin=rewards.ranking_margin(),
            reference_ranking_margin=rewards.reference_ranking_margin(),
        )
        .bottom_k(count, by=["margin", "row"])
        .sort("margin", "row")
        .collect(engine="streaming")
    )


class _Accuracy(NamedTuple):
    prompts: int
    reward_accuracy: Interval


def _accuracies_by_source(pairs: pl.DataFrame) -> dict[str | None, _Accuracy]:
    sources = pairs["source"].to_physical()
    codes = sources.fill_null(sources.max() + 1).to_numpy()  # type: ignore[operator]
    prompts = pairs["prompt"].to_numpy()
    order = np.lexsort((prompts, codes))
    starts = cluster_starts(codes[order], prompts[order])
    right = pairs.select(holds=rewards.reward_accuracy().cast(pl.Int32))["holds"].to_numpy()
    right = np.add.reduceat(right[order], starts)
    sizes = np.diff(starts, append=len(pairs))
    first = cluster_starts(codes[order][starts])
    names = pairs["source"].gather(order[starts[first]]).cast(pl.String).to_list()
    parts = zip(np.split(right, first[1:]), np.split(sizes, first[1:]), strict=True)
    return {name: _Accuracy(len(k), _share(k, n)) for name, (k, n) in zip(names, parts, strict=True)}


def _share(right: IntArray, pairs: IntArray) -> Interval:
    # Most prompts have equal counts, so a million prompts have only dozens of distinct ones.
    base = int(pairs.max()) + 1
    distinct, counts = np.unique(pairs * base + right, return_counts=True)
    trials, successes = np.divmod(distinct, base)
    return share_interval(
        successes=successes.astype(np.float64), trials=trials.astype(np.float64), multiplicities=counts
    )
