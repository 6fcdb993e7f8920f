"""Writes every pair's final numbers as one Parquet file, for a reader's own questions."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from dpo_opt.analysis import rewards
from dpo_opt.analysis.quadrants import MOVEMENTS, RANKINGS, movement, ranking_quadrant
from dpo_opt.analysis.view import RunView
from dpo_opt.schemas.storage import publish


def export_pairs(views: Sequence[RunView], output: Path) -> None:
    """Write a row for each pair of each run whose final log-probs are known, of at least one run.

    Columns: ``run``, ``row``, ``pair_id``, ``source``, ``held_out``; ``reference_margin`` and
    ``trained_margin`` (log p(chosen) - log p(rejected), nats), ``ranking`` (of ``RANKINGS``); both log-ratios
    (nats), ``movement`` (of ``MOVEMENTS``; null where one is not finite) and ``margin`` of the rewards.
    """
    frames = [
        view.final.pairs.select(
            pl.lit(view.run.name).alias("run"),
            "row",
            "pair_id",
            pl.col("source").cast(pl.String),
            "held_out",
            rewards.reference_margin().alias("reference_margin"),
            rewards.ranking_margin().alias("trained_margin"),
            _named(ranking_quadrant(), RANKINGS).alias("ranking"),
            rewards.chosen_logratio().alias("chosen_logratio"),
            rewards.rejected_logratio().alias("rejected_logratio"),
            _named(movement(view.run.margin_noise or 0.0), [m.name for m in MOVEMENTS]).alias("movement"),
            rewards.margin(beta=view.run.beta).alias("margin"),
        )
        for view in views
        if view.final
    ]
    with publish(output) as private:
        pl.concat(frames).sink_parquet(private)


def _named(number: pl.Expr, names: Sequence[str]) -> pl.Expr:
    return number.replace_strict(range(len(names)), names, default=None, return_dtype=pl.String)
