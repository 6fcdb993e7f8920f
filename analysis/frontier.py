"""The frontier: what reward a policy's samples get, against how far it moved from the reference to get it.

Reward and KL are taken from the same samples. Policies compare at equal KL: a higher reward that a larger KL
bought may only be the result of longer or harder training (Rafailov et al., arXiv 2305.18290, section 6.1).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from dpo_opt.analysis.intervals import Interval, as_record, ratio_interval
from dpo_opt.analysis.kl import KLFile
from dpo_opt.analysis.load import scan_kl_samples
from dpo_opt.analysis.run_settings import losses_in_words, read_run_config
from dpo_opt.analysis.table_checks import set_aside
from dpo_opt.schemas.errors import DataError, first_line
from dpo_opt.schemas.run_layout import KL
from dpo_opt.schemas.storage import publish

FRONTIER_TABLE = "frontier.parquet"
_INTERVALS = ("kl", "reward")
_COLUMNS = {
    **dict.fromkeys(("run", "file"), pl.String),
    "step": pl.Int64,
    "beta": pl.Float64,
    **dict.fromkeys(("loss_type", "rated_by", "rated_by_sha256"), pl.String),
    **dict.fromkeys(("samples", "prompts"), pl.Int64),
    "unfinished": pl.Float64,
    **dict.fromkeys((f"{name}{bound}" for name in _INTERVALS for bound in ("", "_low", "_high")), pl.Float64),
}
"""Of the table: those of ``FrontierPoint``, an interval as three."""
_MAY_BE_NULL = ("step", "beta", "loss_type", "rated_by_sha256")


class FrontierPoint(NamedTuple):
    """One policy: its KL and its reward, on its own samples, with intervals over prompts."""

    run: str
    """Name of the run's folder, with folders above it where several have one name."""
    file: str
    """Table of the samples, in the run's folder ``kl/``."""
    step: int | None
    beta: float | None
    loss_type: str | None
    rated_by: str
    """What gave the rewards."""
    rated_by_sha256: str | None
    """Of the file or the weights that gave them; None for a column."""
    samples: int
    prompts: int
    unfinished: float
    """Share of samples that the token limit cut off."""
    kl: Interval
    """Per completion, in nats; the best estimate of the table."""
    reward: Interval
    """Mean over the samples."""

    def as_record(self) -> dict[str, Any]:
        """Its fields as JSON has them."""
        return as_record(self._asdict())


def frontier_point(
    run: Path, kl: KLFile, rewards: Sequence[float], *, rated_by: str, rated_by_sha256: str | None
) -> FrontierPoint:
    """The point of one table of samples.

    Args:
        run: The run's folder.
        kl: One of ``kl_of_run``.
        rewards: (samples,) in the order of the table.
        rated_by: What gave them.
        rated_by_sha256: Of the file or the weights that gave them.

    Raises:
        DataError: The rewards are too large to be averaged.
    """
    samples = scan_kl_samples(run / KL / kl.file).select("prompt_id").collect()
    sums = (
        samples.with_columns(reward=pl.Series(rewards, dtype=pl.Float64))
        .group_by("prompt_id")
        .agg(pl.sum("reward"), pl.len().cast(pl.Float64).alias("samples"))
        .sort("prompt_id")
    )
    by_prompt = sums["reward"].to_numpy()
    with np.errstate(over="ignore"):
        countable = bool(np.isfinite(np.square(by_prompt).sum()))
    if not countable:
        raise DataError(
            f"the rewards are too large to be averaged (up to {max(map(abs, rewards)):.3g})",
            where=str(run / KL / kl.file),
            why="their squares, which the interval needs, are beyond the largest number",
            fix="scale the rewards down, then run the same command again",
        )
    settings = read_run_config(run)
    beta = settings.get("beta")
    return FrontierPoint(
        run=run.absolute().name,
        file=kl.file,
        step=kl.step,
        beta=None if beta is None else float(beta),  # type: ignore[arg-type]
        loss_type=losses_in_words(settings.get("loss_type")),
        rated_by=rated_by,
        rated_by_sha256=rated_by_sha256,
        samples=kl.estimate.samples,
        prompts=kl.estimate.prompts,
        unfinished=kl.estimate.unfinished.value,
        kl=kl.estimate.best,
        reward=ratio_interval(numerators=by_prompt, denominators=sums["samples"].to_numpy()),
    )


def write_frontier(run: Path, points: Iterable[FrontierPoint]) -> None:
    """Write a run's points to ``RUN/frontier.parquet``, in place of those that are there."""
    rows = [
        {name: value for name, value in point._asdict().items() if name not in _INTERVALS}
        | {
            f"{name}{bound}": value
            for name in _INTERVALS
            for bound, value in zip(("", "_low", "_high"), getattr(point, name), strict=True)
        }
        for point in points
    ]
    with publish(run / FRONTIER_TABLE) as private:
        pl.DataFrame(rows, schema=_COLUMNS).write_parquet(private)


def read_frontier(run: Path) -> list[FrontierPoint]:
    """A run's points, in the order of their steps; none where none were measured.

    Raises:
        DataError: The table is damaged.
    """
    file = run / FRONTIER_TABLE
    if not file.exists():
        return []
    try:
        table = pl.read_parquet(file, glob=False).select(pl.col(n).cast(t) for n, t in _COLUMNS.items())
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _no_frontier(file, first_line(error)) from error
    if lacking := [n for n in _COLUMNS if n not in _MAY_BE_NULL and table[n].null_count()]:
        raise _no_frontier(file, f"a point has no {lacking[0]}")
    if any(not table[name].is_finite().all() for name in _INTERVALS):
        raise _no_frontier(file, "a point's KL or reward is not finite")
    return [_point(row) for row in table.iter_rows(named=True)]


def _no_frontier(file: Path, problem: str) -> DataError:
    return DataError(
        f"this is not a table of a frontier ({problem})",
        where=str(file),
        why="its points are drawn in the report",
        fix=f"{set_aside(file, called='other')}, and measure it again with `dpo-opt frontier`",
    )


def _point(row: Mapping[str, object]) -> FrontierPoint:
    intervals = {
        name: Interval(*(row[f"{name}{bound}"] for bound in ("", "_low", "_high")))  # type: ignore[arg-type]
        for name in _INTERVALS
    }
    plain = {name: row[name] for name in FrontierPoint._fields if name not in _INTERVALS}
    return FrontierPoint(**plain, **intervals)  # type: ignore[arg-type]
