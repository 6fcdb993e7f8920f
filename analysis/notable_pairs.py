"""Picks the pairs that a person should read: the worst, the heaviest in the gradient, those that turned."""

from collections.abc import Sequence
from typing import NamedTuple

import polars as pl

from dpo_opt.analysis import rewards
from dpo_opt.analysis.quadrants import RANKINGS, ranking_quadrant
from dpo_opt.analysis.slices import ShardSlice
from dpo_opt.analysis.token_texts import PairText, TokenDecoder, pair_texts


class NotablePair(NamedTuple):
    """A pair with its numbers and its text."""

    row: int
    source: str | None
    held_out: bool
    margin: float
    """Of the rewards."""
    chosen_logratio: float
    rejected_logratio: float
    reference_ranking_margin: float
    ranking_margin: float
    chosen_length: int
    rejected_length: int
    text: PairText
    weight: float | None = None
    """Mean gradient weight of its visits, for pairs that drove the gradient."""

    @property
    def has_context(self) -> bool:
        """Whether something inside one of the completions does not count."""
        return any(part.context for part in (*self.text.chosen, *self.text.rejected))


class NotablePairs(NamedTuple):
    """Lists of pairs to read, each the most extreme first."""

    worst: list[NotablePair]
    """Lowest final margins, of the pairs that the policy is judged by."""
    drivers: list[NotablePair]
    """Heaviest in the gradient, of the pairs that were trained on."""
    turned_wrong: list[NotablePair]
    """The reference ranks them correctly and the policy does not."""
    turned_right: list[NotablePair]

    def every(self) -> list[NotablePair]:
        """All of them; a pair may be of several lists."""
        return [*self.worst, *self.drivers, *self.turned_wrong, *self.turned_right]


def notable_pairs(
    pairs: pl.LazyFrame,
    judging: pl.LazyFrame,
    *,
    drivers: pl.DataFrame,
    beta: float,
    slices: Sequence[ShardSlice],
    policy: pl.LazyFrame,
    decoder: TokenDecoder,
    count: int,
) -> NotablePairs:
    """Find the pairs of every list, and their texts.

    Args:
        pairs: From ``final_pairs``.
        judging: Those of them that say how good the policy is.
        drivers: Of ``Trajectories``; those without a final state are left out.
        beta: The run's beta.
        slices: From ``shard_slices``.
        policy: The final state's table, for the log-probs of single tokens.
        decoder: Of the same shards.
        count: Of pairs in each of the first two lists, and half as many in the others.
    """
    change = pl.col("ranking_margin") - pl.col("reference_ranking_margin")
    lists = [
        hardest_pairs(judging, beta=beta, count=count),
        _with_weights(pairs, drivers, beta=beta),
        *(
            _lowest(
                judging.filter(ranking_quadrant() == RANKINGS.index(name)), by, beta=beta, count=count // 2
            )
            for name, by in (("turned wrong", change), ("turned right", -change))
        ),
    ]
    rows = pl.concat([frame["row"] for frame in lists]).unique().to_list()
    texts: dict[int, PairText] = {}
    for part in slices:
        # Only the shards that hold one of them are opened.
        if here := pl.DataFrame({"row": rows}, schema={"row": pl.Int64}).filter(part.rows)["row"].to_list():
            texts |= pair_texts(part.shards, here, decoder, policy)
    columns = [name for name in NotablePair._fields if name not in ("text", "weight")]
    return NotablePairs(
        *(
            [
                NotablePair(
                    **{name: row[name] for name in columns}, text=texts[row["row"]], weight=row.get("weight")
                )
                for row in frame.iter_rows(named=True)
            ]
            for frame in lists
        )
    )


def hardest_pairs(pairs: pl.LazyFrame, *, beta: float, count: int) -> pl.DataFrame:
    """The pairs with the lowest final margin, lowest first, with ``margin`` and both ranking margins."""
    return _lowest(pairs, pl.col("margin"), beta=beta, count=count)


def _lowest(pairs: pl.LazyFrame, by: pl.Expr, *, beta: float, count: int) -> pl.DataFrame:
    return (
        _with_margins(pairs, beta=beta)
        .with_columns(by.alias("by"))
        .filter(pl.col("by").is_finite())
        .bottom_k(count, by=["by", "row"])
        .sort("by", "row")
        .drop("by")
        .collect(engine="streaming")
    )


def _with_weights(pairs: pl.LazyFrame, drivers: pl.DataFrame, *, beta: float) -> pl.DataFrame:
    if drivers.is_empty():
        return _with_margins(pairs, beta=beta).head(0).collect()
    mean = drivers.select("row", order=pl.int_range(pl.len()), weight=pl.col("weight") / pl.col("visits"))
    found = pairs.filter(pl.col("row").is_in(mean["row"].to_list()))
    return _with_margins(found, beta=beta).collect(engine="streaming").join(mean, on="row").sort("order")


def _with_margins(pairs: pl.LazyFrame, *, beta: float) -> pl.LazyFrame:
    return pairs.with_columns(
        margin=rewards.margin(beta=beta),
        chosen_logratio=rewards.chosen_logratio(),
        rejected_logratio=rewards.rejected_logratio(),
        ranking_margin=rewards.ranking_margin(),
        reference_ranking_margin=rewards.reference_margin(),
    )
