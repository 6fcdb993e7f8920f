"""Writes every pair's final numbers as one Parquet file, for a reader's own questions."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_opt.analysis import rewards
from dpo_opt.analysis.final_state import FinalState
from dpo_opt.analysis.quadrants import MOVEMENTS, RANKINGS, movement, ranking_quadrant
from dpo_opt.analysis.view import RunView
from dpo_opt.schemas.arrow_file import arrow_file
from dpo_opt.schemas.outputs import PARQUET_KEY, output_mark
from dpo_opt.schemas.storage import publish

_SCHEMA = pa.schema(
    {
        "run": pa.string(),
        "row": pa.int64(),
        "pair_id": pa.string(),
        "source": pa.string(),
        "held_out": pa.bool_(),
        "reference_margin": pa.float64(),
        "trained_margin": pa.float64(),
        "ranking": pa.string(),
        "chosen_logratio": pa.float64(),
        "rejected_logratio": pa.float64(),
        "movement": pa.string(),
        "margin": pa.float64(),
    },
    metadata={PARQUET_KEY: output_mark("report")},
)


def export_pairs(views: Sequence[RunView], output: Path) -> None:
    """Write a row for each pair of each run whose final log-probs are known, of at least one run.

    Columns: ``run``, ``row``, ``pair_id``, ``source``, ``held_out``; ``reference_margin`` and
    ``trained_margin`` (log p(chosen) - log p(rejected), nats), ``ranking`` (of ``RANKINGS``); both log-ratios
    (nats), ``movement`` (of ``MOVEMENTS``; null where one is not finite) and ``margin`` of the rewards.
    """
    with (
        publish(output) as private,
        arrow_file(private, "wb") as sink,
        pq.ParquetWriter(sink, _SCHEMA, compression="zstd") as writer,
    ):
        for view in views:
            if view.final:
                for some in _by_slice(view, view.final):
                    writer.write_table(some.to_arrow().cast(_SCHEMA))


def _by_slice(view: RunView, final: FinalState) -> Iterator[pl.DataFrame]:
    for part in view.slices:
        ids = part.shards.select("row", "pair_id")
        pairs = final.pairs.filter(part.rows).join(ids, on="row", maintain_order="left")
        yield pairs.select(
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
        ).collect(engine="streaming")


def _named(number: pl.Expr, names: Sequence[str]) -> pl.Expr:
    return number.replace_strict(range(len(names)), names, default=None, return_dtype=pl.String)
