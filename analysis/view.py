"""Computes everything that the report shows about one run, before any HTML is written.

Parts may be missing: a run that was not scored or not evaluated, or that has just begun, still has a section.
The missing parts are then None or empty.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from dpo_opt.analysis import rewards
from dpo_opt.analysis.binned import drawn, finite
from dpo_opt.analysis.calibration import Calibration, calibration
from dpo_opt.analysis.diagnosis.diagnose import diagnose
from dpo_opt.analysis.diagnosis.finding import Diagnosis
from dpo_opt.analysis.final_state import FinalState, final_state, held_out_rows
from dpo_opt.analysis.frontier import FrontierPoint, read_frontier
from dpo_opt.analysis.generalization import Overfitting, overfitting
from dpo_opt.analysis.intervals import FloatArray
from dpo_opt.analysis.kl import KLFile, kl_of_run
from dpo_opt.analysis.labelled import LabelledState, labelled_state
from dpo_opt.analysis.load import scan_kl_samples, scan_pair_logps
from dpo_opt.analysis.notable_pairs import NotablePairs, notable_pairs
from dpo_opt.analysis.outcomes import (
    LengthBias,
    SourceOutcome,
    by_source,
    length_bias,
    reference_accuracy,
)
from dpo_opt.analysis.quadrants import RankingQuadrant, movement_shares, ranking_quadrants
from dpo_opt.analysis.run_figures import run_figures
from dpo_opt.analysis.run_files import Run, last_entry
from dpo_opt.analysis.slices import ShardSlice, copy_reference, pair_ids, shard_slices
from dpo_opt.analysis.token_texts import TokenDecoder, completion_start, prompt_end
from dpo_opt.analysis.trajectories import Trajectories, trajectories
from dpo_opt.analysis.unpaired_rows import is_unpaired
from dpo_opt.schemas.manifest import Manifest, load_manifest
from dpo_opt.schemas.run_layout import KL, PAIR_LOGPS

NOTABLE = 6
SAMPLES = 4


class Sample(NamedTuple):
    """A completion that the policy sampled."""

    prompt: str
    completion: str
    finished: bool
    tokens: int


class LastEvaluation(NamedTuple):
    """What training itself found for the held-out pairs that were scored."""

    step: int
    reward_accuracy: float
    mean_margin: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What the final state's pairs say, of those that say how good the policy is."""

    movements: dict[str, float]
    """Shares by the names of ``MOVEMENTS``."""
    rankings: list[RankingQuadrant]
    pair_ids: dict[int, str]
    """Of the rankings' examples, by row."""
    calibration: Calibration | None
    sources: list[SourceOutcome]
    lengths: LengthBias
    smallest_margin: float
    """The 5th percentile of the log-prob margins' size, in nats, to compare rounding with."""
    notable: NotablePairs


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """One run as the template shows it. The figures are SVG."""

    run: Run
    manifest: Manifest
    slices: Sequence[ShardSlice]
    reference: float | None
    """Share of all kept pairs that the reference ranks correctly."""
    figures: dict[str, str]
    trajectories: Trajectories | None
    diagnosis: Diagnosis | None
    """None of unpaired rows: all that it asks for is about pairs."""
    final: FinalState | None
    judged: Judged | None
    last_evaluation: LastEvaluation | None
    """Where it differs from what the scored checkpoint says of the same pairs."""
    overfitting: Overfitting | None
    unpaired: bool
    """The rows have one completion and a label each; nothing that compares two of a prompt is known then."""
    labelled: LabelledState | None
    """In place of ``final``, of such rows."""
    kl: list[KLFile]
    frontier: list[FrontierPoint]
    """What ``dpo-opt frontier`` found."""
    samples: list[Sample]
    text_problem: str | None


def view_run(run: Run, scratch: Path) -> RunView:
    """Compute everything that the report shows about a run.

    Args:
        run: The run.
        scratch: An empty folder, which stays as long as the view is used.

    Raises:
        DataError: A table is damaged, or its pairs are not those of the run's shards.
    """
    manifest = load_manifest(run.shards)
    slices = shard_slices(run.shards)
    logps = scan_pair_logps(run.path) if run.tables(PAIR_LOGPS) else None
    if len(slices) > 1:
        (scratch / "reference").mkdir()
        slices = copy_reference(slices, scratch / "reference")
    held_out = held_out_rows(logps)
    unpaired = is_unpaired(manifest)
    labelled = labelled_state(run, logps, slices, held_out, scratch) if unpaired else None
    found = None
    if logps is not None and not unpaired:
        # Other losses weigh a pair in other ways.
        drivers = NOTABLE if run.config.get("loss_type") == "sigmoid" else 0
        noise = run.margin_noise or 0.0
        found = trajectories(
            logps, slices, beta=run.beta, noise=noise, drivers=drivers, scratch=scratch / "logps"
        )
    final = None if unpaired else final_state(run, logps, slices, held_out, scratch)
    kl = kl_of_run(run.path)
    reference = None if unpaired else reference_accuracy(slices)
    decoder = TokenDecoder(run.shards)
    judged = _judged(run, final, found, slices, decoder) if final else None
    return RunView(
        run=run,
        manifest=manifest,
        slices=slices,
        reference=reference,
        figures=run_figures(run, reference, found, final, judged.calibration if judged else None),
        trajectories=found,
        diagnosis=None if unpaired else diagnose(run, final, slices),
        final=final,
        judged=judged,
        unpaired=unpaired,
        labelled=labelled,
        last_evaluation=_last_evaluation(run, final) if final else None,
        overfitting=overfitting(final.splits if final else {}, run.evals),
        kl=kl,
        frontier=[point._replace(run=run.name) for point in read_frontier(run.path)],
        samples=_samples(run.path / KL / kl[-1].file, decoder) if kl else [],
        text_problem=decoder.problem,
    )


def _judged(
    run: Run,
    final: FinalState,
    found: Trajectories | None,
    slices: Sequence[ShardSlice],
    decoder: TokenDecoder,
) -> Judged:
    pairs = final.judging
    rankings = ranking_quadrants(pairs, beta=run.beta)
    examples = [row for quadrant in rankings for row in quadrant.examples]
    size = (rewards.chosen_logratio() - rewards.rejected_logratio()).abs()
    return Judged(
        movements=movement_shares(pairs, noise=run.margin_noise or 0.0),
        rankings=rankings,
        pair_ids=pair_ids(slices, examples),
        calibration=calibration(pairs, beta=run.beta),
        sources=by_source(pairs, beta=run.beta),
        lengths=length_bias(pairs, beta=run.beta),
        smallest_margin=_percentile(finite(drawn(pairs, size.alias("size"))["size"]), 5),
        notable=notable_pairs(
            final.pairs,
            pairs,
            drivers=found.drivers if found else pl.DataFrame(),
            beta=run.beta,
            slices=slices,
            policy=final.table,
            decoder=decoder,
            count=NOTABLE,
        ),
    )


def _last_evaluation(run: Run, final: FinalState) -> LastEvaluation | None:
    evaluation, scored = last_entry(run.evals), final.splits.get("held-out")
    accuracy, margin = evaluation.get("eval_rewards/accuracies"), evaluation.get("eval_rewards/margins")
    if not final.scored or scored is None or accuracy is None or margin is None:
        return None
    if evaluation["step"] != final.step:
        return None  # another state of the policy
    # Rounding moves a mean of margins far less than a hundredth of it.
    same = math.isclose(accuracy, scored.reward_accuracy.value, abs_tol=1e-9)
    if same and math.isclose(margin, scored.mean_margin, rel_tol=0.01, abs_tol=1e-6):
        return None
    return LastEvaluation(final.step, accuracy, margin)


def _samples(table: Path, decoder: TokenDecoder) -> list[Sample]:
    """The first sample of some prompts of a table, one after the other."""
    first = scan_kl_samples(table).filter(pl.col("sample") == 0).head(SAMPLES)
    return [
        Sample(
            prompt=prompt_end(row["prompt_ids"], decoder),
            completion=completion_start(row["completion_ids"], decoder),
            finished=row["finished"],
            tokens=len(row["completion_ids"]),
        )
        for row in first.select("prompt_ids", "completion_ids", "finished").collect().iter_rows(named=True)
    ]


def _percentile(values: FloatArray, q: float) -> float:
    return float(np.percentile(values, q)) if len(values) else math.nan
