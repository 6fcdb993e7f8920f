"""Writes what was found: points.parquet, claims.json, frontier.svg and results.md."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from claims import Claim, claims
from figure import figure
from points import Point, write_points
from settings import ONLINE, TITLES, Experiment

from dpo_opt.analysis.figures.drawing import svg
from dpo_opt.analysis.intervals import ratio_interval
from dpo_opt.schemas.storage import write_text


def write_results(
    folder: Path, points: Sequence[Point], experiment: Experiment, rates: Mapping[str, float]
) -> None:
    """Write all results into the experiment's folder.

    Args:
        folder: The experiment's.
        points: All that was measured on held-out prompts.
        experiment: Its settings.
        rates: The learning rate that each trained method was given.
    """
    found = claims(points)
    write_points(folder / "points.parquet", points)
    write_text(folder / "claims.json", json.dumps([c.as_record() for c in found], indent=1) + "\n")
    write_text(folder / "frontier.svg", svg(figure(points), label="Reward against KL of each method"))
    lines = [*_claims(found), "", *_policies(points, rates), "", *_budgets(experiment)]
    write_text(folder / "results.md", "\n".join(lines) + "\n")


def _claims(found: Sequence[Claim]) -> Iterator[str]:
    yield "| statement | mean difference of the rewards (95% interval) | compared over a KL of | verdict |"
    yield "|---|---|---|---|"
    for claim in found:
        d, (low, high) = claim.difference, claim.kl
        cells = [f"{d.value:+.3f} ({d.low:+.3f} to {d.high:+.3f})", f"{low:.2f} to {high:.2f} nats"]
        if low > high:
            cells = ["-", "none: their policies share none"]
        yield f"| {claim.statement} | {' | '.join(cells)} | {claim.verdict} |"


def _policies(points: Sequence[Point], rates: Mapping[str, float]) -> Iterator[str]:
    """Each method's last policies: means over repetitions, with prompts as clusters."""
    yield "| method | knob | learning rate | reward (95% interval) | KL, nats per completion (95% interval) |"
    yield "|---|---|---|---|---|"
    order = ["sft", *TITLES]
    last: dict[tuple[str, float, int], Point] = {}
    for point in points:
        key = (point.method, point.knob or 0.0, point.seed)
        if key not in last or last[key].step < point.step:
            last[key] = point
    ordered = sorted(last.items(), key=lambda item: (order.index(item[0][0]), item[0][1:]))
    for (method, knob), items in groupby(ordered, key=lambda item: item[0][:2]):
        own = [point for _, point in items]
        cells = [
            _title(method),
            f"{knob:g}" if knob else "-",
            f"{rates[method]:g}" if method in rates else "-",
            _mean([point.reward for point in own], "+.3f"),
            _mean([point.kl for point in own], ".2f"),
        ]
        yield f"| {' | '.join(cells)} |"


def _title(method: str) -> str:
    return "reference (SFT)" if method == "sft" else {str(k): v for k, v in TITLES.items()}[method]


def _mean(of_seeds: Sequence[np.ndarray], form: str) -> str:
    per_prompt = np.mean(of_seeds, axis=0)
    i = ratio_interval(numerators=per_prompt, denominators=np.ones_like(per_prompt))
    return f"{i.value:{form}} ({i.low:{form}} to {i.high:{form}})"


def _budgets(experiment: Experiment) -> Iterator[str]:
    """What each method may sample and try."""
    pairs = experiment.train_prompts * experiment.completions
    tried = max(len(m.learning_rates) for m in experiment.methods.values())
    yield f"* Completions with a reward that a run learns from: {pairs:,} of the reference (methods on pairs)"
    if any(name in experiment.methods for name in ONLINE):
        yield f"* or {experiment.ppo.steps * experiment.ppo.batch_size:,} of the policy (PPO, PPO-GT)."
    yield (
        f"* Measured policies: {experiment.held_out.samples} completions of each of "
        f"{experiment.held_out.prompts} held-out prompts."
    )
    yield f"* Learning rates tried for each method: {tried}."
    yield f"* Seeds: {', '.join(map(str, experiment.seeds))}."
