"""What was measured, as numbers and as tables."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import polars as pl
from folders import Work
from win_rates import WinRate

from dpo_opt.analysis import (
    accuracy,
    chosen_logratio,
    displacement,
    estimate_kl,
    rejected_logratio,
    scan_kl_samples,
    scan_shards,
)
from dpo_opt.analysis.intervals import Interval
from dpo_opt.analysis.load import join_reference, scan_pair_logps
from dpo_opt.analysis.outcomes import means_over_prompts, shares_over_prompts
from dpo_opt.schemas.storage import write_text


class HeldOut(NamedTuple):
    """What the policy makes of held-out pairs; intervals are over prompts."""

    pairs: int
    reward_accuracy: Interval
    """Share of pairs whose chosen completion gained more than the rejected one."""
    displaced: Interval
    """Share of pairs whose chosen completion fell although the margin grew (arXiv 2410.08847)."""
    chosen: Interval
    """Mean log-ratio of chosen completions, in nats."""
    rejected: Interval
    kl: Interval
    """KL from the reference on the policy's own completions, in nats per completion."""


def held_out_pairs(work: Work, scores: Path, kl: Path) -> HeldOut:
    """Read the policy's log-probs of held-out pairs, and its own samples."""
    pairs = join_reference(scan_pair_logps(scores), scan_shards(work.folder / "shards" / "eval"))
    frame = pairs.with_columns(prompt=pl.col("prompt_id").hash()).collect()
    _, shares = shares_over_prompts(frame, accuracy(), displacement())
    means = means_over_prompts(frame, chosen_logratio(), rejected_logratio())
    return HeldOut(len(frame), *shares, *means, estimate_kl(scan_kl_samples(kl)).k1_sequence)


def write_results(work: Work, held_out: HeldOut, wins: list[WinRate]) -> None:
    """Write results.json and results.md."""
    record = {
        "held_out": {name: _record(value) for name, value in held_out._asdict().items()},
        "win_rates": [{name: _record(value) for name, value in won._asdict().items()} for won in wins],
    }
    write_text(work.folder / "results.json", json.dumps(record, indent=1) + "\n")
    write_text(work.folder / "results.md", "\n".join(_lines(held_out, wins)) + "\n")


def _lines(held_out: HeldOut, wins: list[WinRate]) -> Iterator[str]:
    yield f"| {held_out.pairs:,} held-out pairs | (95% interval over prompts) |"
    yield "|---|---|"
    names = {
        "reward_accuracy": "reward accuracy",
        "displaced": "share of pairs displaced",
        "chosen": "log-ratio of chosen, nats",
        "rejected": "log-ratio of rejected, nats",
        "kl": "KL from the reference, nats per completion",
    }
    for name, title in names.items():
        yield f"| {title} | {_shown(getattr(held_out, name))} |"
    yield ""
    yield f"| {wins[0].prompts} held-out prompts | wins against the chosen completion | ties | empty |"
    yield "|---|---|---|---|"
    for won in wins:
        yield f"| {won.name} | {_shown(won.rate)} | {won.ties} | {won.empty} |"


def _shown(found: Interval) -> str:
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def _record(value: object) -> object:
    return value.as_record() if isinstance(value, Interval) else value
