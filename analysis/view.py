"""Computes everything that the report shows about one run, before any HTML is written.

Parts may be missing: a run that was not scored or not evaluated, or that has just begun, still has a section.
The missing parts are then None or empty.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import polars as pl

from dpo_opt.analysis.figures import curves, distributions
from dpo_opt.analysis.figures.drawing import svg
from dpo_opt.analysis.final_state import FinalState, final_state, held_out_rows
from dpo_opt.analysis.generalization import Overfitting, overfitting
from dpo_opt.analysis.kl import KLEstimate, estimate_kl
from dpo_opt.analysis.load import (
    KL_FOLDER,
    PAIR_LOGPS_FOLDER,
    scan_kl_samples,
    scan_pair_logps,
    scan_shards,
    shard_slices,
)
from dpo_opt.analysis.outcomes import (
    LengthBias,
    SourceOutcome,
    by_source,
    hardest_pairs,
    length_bias,
    reference_accuracy,
)
from dpo_opt.analysis.run_files import Run
from dpo_opt.analysis.summary import KLSummary, PairsSummary, RunSummary, known, known_values, last_entry
from dpo_opt.analysis.token_texts import (
    PairText,
    TokenDecoder,
    completion_start,
    pair_texts,
    prompt_end,
)
from dpo_opt.analysis.trajectories import logratio_trajectories
from dpo_opt.schemas.manifest import Manifest, load_manifest

HARDEST = 8
SAMPLES = 4


class HardPair(NamedTuple):
    """One of the pairs with the lowest final margin."""

    row: int
    source: str | None
    held_out: bool
    margin: float
    reference_ranking_margin: float
    ranking_margin: float
    chosen_length: int
    rejected_length: int
    text: PairText

    @property
    def has_context(self) -> bool:
        """Whether something inside one of the completions does not count."""
        return any(part.context for part in (*self.text.chosen, *self.text.rejected))


class Sample(NamedTuple):
    """A completion that the policy sampled."""

    prompt: str
    completion: str
    finished: bool
    tokens: int


class KLFile(NamedTuple):
    """One table of on-policy samples."""

    file: str
    estimate: KLEstimate


class LastEvaluation(NamedTuple):
    """What training itself found for the held-out pairs that were scored."""

    step: int
    reward_accuracy: float
    mean_margin: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """One run as the template shows it. The figures are SVG."""

    run: Run
    manifest: Manifest
    summary: RunSummary
    figures: dict[str, str]
    trajectories: pl.DataFrame | None
    final: FinalState | None
    last_evaluation: LastEvaluation | None
    """Where it differs from what the scored checkpoint says of the same pairs."""
    overfitting: Overfitting | None
    sources: list[SourceOutcome]
    lengths: LengthBias | None
    kl: list[KLFile]
    samples: list[Sample]
    hardest: list[HardPair]
    text_problem: str | None


def view_run(run: Run) -> RunView:
    """Compute everything that the report shows about a run.

    Raises:
        DataError: A table is damaged, or its pairs are not those of the run's shards.
    """
    manifest = load_manifest(run.shards)
    slices = shard_slices(run.shards)
    logps = scan_pair_logps(run.path) if run.tables(PAIR_LOGPS_FOLDER) else None
    held_out = held_out_rows(logps)
    trajectories = logratio_trajectories(logps, slices) if logps is not None else None
    final = final_state(run, logps, slices, held_out)
    kl = [KLFile(file.name, estimate_kl(scan_kl_samples(file))) for file in run.tables(KL_FOLDER)]
    reference = reference_accuracy(slices)
    decoder = TokenDecoder(run.shards)
    return RunView(
        run=run,
        manifest=manifest,
        summary=_summary(run, reference, final, kl),
        figures=_figures(run, reference, trajectories, final),
        trajectories=trajectories,
        final=final,
        last_evaluation=_last_evaluation(run, final) if final else None,
        overfitting=overfitting(final.splits if final else {}, run.evals),
        sources=by_source(final.judging, beta=run.beta) if final else [],
        lengths=length_bias(final.judging, beta=run.beta) if final else None,
        kl=kl,
        samples=_samples(run, decoder) if kl else [],
        hardest=_hardest(run, final, decoder) if final else [],
        text_problem=decoder.problem,
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


def _samples(run: Run, decoder: TokenDecoder) -> list[Sample]:
    """The first sample of some prompts of the last table, one after the other."""
    first = scan_kl_samples(run.tables(KL_FOLDER)[-1]).filter(pl.col("sample") == 0).head(SAMPLES)
    return [
        Sample(
            prompt=prompt_end(row["prompt_ids"], decoder),
            completion=completion_start(row["completion_ids"], decoder),
            finished=row["finished"],
            tokens=len(row["completion_ids"]),
        )
        for row in first.select("prompt_ids", "completion_ids", "finished").collect().iter_rows(named=True)
    ]


def _figures(
    run: Run, reference: float | None, trajectories: pl.DataFrame | None, final: FinalState | None
) -> dict[str, str]:
    figures = {}
    if "loss" in run.train.columns:
        # Where other losses begin depends on their options and lengths.
        alone = run.config.get("loss_type") == "sigmoid" and run.config.get("loss_weights") is None
        untrained = math.log(2) if alone else None
        loss = curves.loss_curve(run.train, run.evals, untrained=untrained)
        figures["loss"] = svg(loss, label="Loss against steps")
    if "rewards/margins" in run.train.columns:
        reward = curves.reward_curves(run.train, run.evals)
        margin = curves.margin_curve(run.train, run.evals)
        accuracy = curves.accuracy_curve(run.train, run.evals, reference=reference)
        figures["rewards"] = svg(reward, label="Implicit rewards against steps")
        figures["margin"] = svg(margin, label="Margin against steps")
        figures["accuracy"] = svg(accuracy, label="Accuracy against steps")
    if "grad_norm" in run.train.columns and run.train["grad_norm"].is_finite().any():
        update = curves.update_curves(run.train)
        figures["update"] = svg(update, label="Gradient norm and learning rate against steps")
    if trajectories is not None and len(trajectories):
        logratios = curves.logratio_curves(trajectories)
        figures["logratios"] = svg(logratios, label="Mean log-ratios against steps")
    if final:
        pairs, beta = final.judging, run.beta
        histogram = distributions.margin_histogram(pairs)
        margins = distributions.reward_margin_histogram(pairs, beta=beta)
        lengths = distributions.margin_by_length(pairs, beta=beta)
        figures["histogram"] = svg(histogram, label="Log-prob margins before and after training")
        figures["margins"] = svg(margins, label="Final reward margins")
        figures["lengths"] = svg(lengths, label="Margin against length difference")
    return figures


def _hardest(run: Run, final: FinalState, decoder: TokenDecoder) -> list[HardPair]:
    hardest = hardest_pairs(final.pairs, beta=run.beta, count=HARDEST)
    texts = pair_texts(scan_shards(run.shards), hardest["row"].to_list(), decoder)
    columns = [name for name in HardPair._fields if name != "text"]
    rows = hardest.select(columns).cast({"source": pl.String}).iter_rows(named=True)
    return [HardPair(**row, text=texts[row["row"]]) for row in rows]


def _losses(recorded: object) -> str | None:
    """A run's loss; several as their sum."""
    if recorded is None:
        return None
    return " + ".join(map(str, recorded)) if isinstance(recorded, list) else str(recorded)


def _summary(run: Run, reference: float | None, final: FinalState | None, kl: list[KLFile]) -> RunSummary:
    splits = final.splits if final else {}
    first = last_entry(run.train.head(1))
    last = last_entry(run.train)
    steps, model, loss_type = last.get("step"), run.config.get("model"), run.config.get("loss_type")
    return RunSummary(
        run=str(run.path),
        model=None if model is None else str(model),
        loss_type=_losses(loss_type),
        beta=run.beta,
        steps=None if steps is None else int(steps),
        epochs=last.get("epoch"),
        first_loss=first.get("loss"),
        final=last,
        eval=last_entry(run.evals),
        reference_ranking_accuracy=known(reference),
        scored=PairsSummary.of(splits["all"]) if "all" in splits else None,
        held_out=PairsSummary.of(splits["held-out"]) if "held-out" in splits else None,
        kl=KLSummary.of(*kl[-1]) if kl else None,
        parity=known_values(run.parity),
        finished=run.finished,
    )
