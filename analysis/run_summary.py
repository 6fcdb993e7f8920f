"""Takes the numbers of a run's view into its part of summary.json."""

import polars as pl
from pydantic import JsonValue

from dpo_opt.analysis.diagnosis.finding import Diagnosis
from dpo_opt.analysis.notable_pairs import NotablePairs
from dpo_opt.analysis.quadrants import MOVEMENTS
from dpo_opt.analysis.run_files import last_entry
from dpo_opt.analysis.run_settings import losses_in_words
from dpo_opt.analysis.summary import (
    KLSummary,
    LabelledSummary,
    PairsSummary,
    RunSummary,
    known,
    known_values,
    numbers_of,
)
from dpo_opt.analysis.view import RunView


def run_summary(view: RunView) -> RunSummary:
    """Every number that the page shows of the run."""
    run, judged, labelled = view.run, view.judged, view.labelled
    splits = view.final.splits if view.final else {}
    last = last_entry(run.train)
    steps, model = last.get("step"), run.config.get("model")
    return RunSummary(
        run=str(run.path),
        model=None if model is None else str(model),
        loss_type=losses_in_words(run.config.get("loss_type")),
        beta=run.beta,
        steps=None if steps is None else int(steps),
        epochs=last.get("epoch"),
        first_loss=known(last_entry(run.train.head(1)).get("loss")),
        final=known_values(last),
        eval=known_values(last_entry(run.evals)),
        reference_ranking_accuracy=known(view.reference),
        scored=PairsSummary.of(splits["all"]) if "all" in splits else None,
        held_out=PairsSummary.of(splits["held-out"]) if "held-out" in splits else None,
        labelled={name: LabelledSummary.of(o) for name, o in labelled.splits.items()} if labelled else None,
        kl=KLSummary.of(view.kl[-1]) if view.kl else None,
        frontier=[point.as_record() for point in view.frontier] or None,
        parity=None if run.parity is None else known_values(run.parity),
        finished=run.finished,
        diagnosis=_diagnosis(view.diagnosis) if view.diagnosis else None,
        movements=known_values(judged.movements) if judged else None,
        rankings=numbers_of(judged.rankings) if judged else None,
        calibration=numbers_of(judged.calibration) if judged else None,
        lengths=numbers_of(judged.lengths) if judged else None,
        sources=numbers_of(judged.sources) if judged else None,
        notable_pairs=_identifiers(judged.notable) if judged else None,
        smallest_margin=known(judged.smallest_margin) if judged else None,
        points=_points(view.trajectories.points) if view.trajectories else None,
    )


def _diagnosis(diagnosis: Diagnosis) -> JsonValue:
    findings = [
        {
            "cause": finding.cause,
            "title": finding.title,
            "evidence": numbers_of(finding.evidence),
            "action": finding.action,
            "pairs": [pair.pair_id for pair in finding.pairs],
        }
        for finding in diagnosis.findings
    ]
    return {
        "verdict": diagnosis.verdict,
        "pairs": diagnosis.pairs,
        "held_out": diagnosis.held_out,
        "doubts": list(diagnosis.doubts),
        "findings": numbers_of(findings),
    }


def _identifiers(notable: NotablePairs) -> dict[str, list[str]]:
    return {name: [pair.text.pair_id for pair in pairs] for name, pairs in notable._asdict().items()}


def _points(points: pl.DataFrame) -> JsonValue:
    named = {f"movement_{i}": movement.name for i, movement in enumerate(MOVEMENTS)}
    return numbers_of(points.rename(named).to_dicts())
