"""Counts and means of pairs in bins: one pass over any number of pairs, with memory for the bins alone.

Where bins begin and end is only a choice of how to show the pairs. It is made by up to 200,000 of them, drawn
by a hash of their row; what is then counted is all of them.
"""

import numpy as np
import polars as pl

from dpo_opt.analysis.intervals import FloatArray, IntArray

_DRAWN = 200_000


def drawn(pairs: pl.LazyFrame, *values: pl.Expr) -> pl.DataFrame:
    """Some values of up to about 200,000 pairs: of all, where there are no more."""
    count = pairs.select(pl.len()).collect(engine="streaming").item()
    every = -(-count // _DRAWN) or 1
    some = pairs if every == 1 else pairs.filter(pl.col("row").hash(seed=1) % every == 0)
    return some.select(*values).collect(engine="streaming")


def finite(values: pl.Series) -> FloatArray:
    """The values that are numbers."""
    found: FloatArray = values.cast(pl.Float64).to_numpy()
    kept: FloatArray = found[np.isfinite(found)]
    return kept


def equal_groups(values: FloatArray, groups: int) -> FloatArray:
    """Inner edges of up to so many groups of about equal size, ascending; fewer where values are equal."""
    if not len(values):
        return np.empty(0)
    edges: FloatArray = np.unique(np.quantile(values, np.linspace(0, 1, groups + 1)[1:-1]))
    return edges


def bin_of(value: pl.Expr, inner_edges: FloatArray) -> pl.Expr:
    """Number of the bin of a value, from 0; a value on an edge belongs above it."""
    edges = pl.lit(pl.Series(inner_edges, dtype=pl.Float64))
    return edges.search_sorted(value, side="right").cast(pl.Int32)


def counts(pairs: pl.LazyFrame, value: pl.Expr, edges: FloatArray) -> IntArray:
    """How many pairs (B,) are between neighbouring edges (B + 1,); the outermost bins hold those beyond."""
    table = (
        pairs.select(value.alias("value"))
        .filter(pl.col("value").is_finite())
        .group_by(bin_of(pl.col("value"), edges[1:-1]).alias("bin"))
        .len()
        .collect(engine="streaming")
    )
    found = np.zeros(len(edges) - 1, dtype=np.int64)
    found[table["bin"].to_numpy()] = table["len"].to_numpy()
    return found
