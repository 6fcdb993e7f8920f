"""Measure the reward that policies get for their KL.

RUNS are folders of runs or of sweeps that `dpo-opt kl` has sampled. Those samples are rated, so that reward
and KL belong together. `dpo-opt report` draws the result.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from pydantic import Field

from dpo_opt.console import watched
from dpo_opt.options import configured, json_option
from dpo_opt.results import say, show, table
from dpo_opt.schemas.settings import Settings

if TYPE_CHECKING:
    from dpo_opt.analysis.frontier import FrontierPoint
    from dpo_opt.analysis.intervals import Interval


class FrontierConfig(Settings):
    """Reward against KL over the policies of runs."""

    runs: list[Path] = Field(default=[])
    """Folders of runs or of sweeps."""
    reward_column: str | None = None
    """Column of the tables of samples that holds the rewards."""
    reward_function: str | None = None
    """FILE.py:NAME, a function of prompts and completions (lists of text) that returns numbers. It is run."""
    reward_model: str | None = None
    """A third model: its log-prob of a completion less the reference's is the reward (implicit reward)."""
    output: Path | None = None
    """SVG file for the figure, besides RUN/frontier.parquet."""


@click.command(help=__doc__)
@configured(FrontierConfig, argument="runs")
@json_option
def command(config: FrontierConfig, as_json: bool) -> None:
    from dpo_opt.kl.frontier import measure_frontier

    points = measure_frontier(config, progress=watched())
    if as_json:
        show({"points": [point.as_record() for point in points]}, as_json)
    else:
        say(_lines(points))


def _lines(points: Sequence["FrontierPoint"]) -> Iterator[str]:
    yield from table(
        ["run", "step", "beta", "loss", "KL", "95% interval", "reward", "95% interval", "cut"],
        [
            [
                point.run,
                "-" if point.step is None else point.step,
                "-" if point.beta is None else f"{point.beta:g}",
                point.loss_type or "-",
                *_interval(point.kl),
                *_interval(point.reward),
                f"{point.unfinished:.1%}",
            ]
            for point in points
        ],
    )
    yield ""
    yield f"reward  {points[0].rated_by}, mean over each policy's samples"
    yield "KL      (policy || reference) per completion, in nats"


def _interval(interval: "Interval") -> tuple[str, str]:
    bounds = f"{interval.low:.4g} to {interval.high:.4g}" if interval.low == interval.low else "one prompt"
    return f"{interval.value:.4g}", bounds
