"""summary.json: a report's numbers for scripts, sweeps and CI jobs. Unknown numbers are null."""

import math
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, JsonValue

from dpo_opt.analysis.compare import Difference
from dpo_opt.analysis.intervals import Interval
from dpo_opt.analysis.kl import KLFile
from dpo_opt.analysis.labelled import LabelledOutcome
from dpo_opt.analysis.outcomes import Outcome


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Bounds(_Record):
    """An estimate with its 95% interval over prompts."""

    value: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, interval: Interval) -> "Bounds":
        return cls(value=known(interval.value), low=known(interval.low), high=known(interval.high))


class PairsSummary(_Record):
    """Results for some pairs under the final policy."""

    pairs: int
    prompts: int
    reward_accuracy: float | None
    reward_accuracy_low: float | None
    reward_accuracy_high: float | None
    ranking_accuracy: float | None
    reference_ranking_accuracy: float | None
    mean_margin: float | None
    share_chosen_logps_fell: float | None
    within_noise: int | None
    """Pairs whose margin is of the size of rounding; null if parity was not measured."""

    @classmethod
    def of(cls, outcome: Outcome) -> "PairsSummary":
        return cls(
            pairs=outcome.pairs,
            prompts=outcome.prompts,
            reward_accuracy=known(outcome.reward_accuracy.value),
            reward_accuracy_low=known(outcome.reward_accuracy.low),
            reward_accuracy_high=known(outcome.reward_accuracy.high),
            ranking_accuracy=known(outcome.ranking_accuracy.value),
            reference_ranking_accuracy=known(outcome.reference_ranking_accuracy.value),
            mean_margin=known(outcome.mean_margin),
            share_chosen_logps_fell=known(outcome.chosen_fell),
            within_noise=outcome.within_noise,
        )


class LabelledSummary(_Record):
    """Results for some rows of one completion and a label, under the final policy."""

    desirable: int
    undesirable: int
    prompts: int
    mean_desirable_logratio: float | None
    mean_undesirable_logratio: float | None
    share_desirable_logps_fell: float | None
    share_undesirable_logps_fell: float | None
    separated: float | None
    """How often, of a desirable and an undesirable row, the desirable one has the higher reward."""

    @classmethod
    def of(cls, outcome: LabelledOutcome) -> "LabelledSummary":
        return cls(
            desirable=outcome.desirable,
            undesirable=outcome.undesirable,
            prompts=outcome.prompts,
            mean_desirable_logratio=known(outcome.mean_desirable_logratio),
            mean_undesirable_logratio=known(outcome.mean_undesirable_logratio),
            share_desirable_logps_fell=known(outcome.desirable_fell),
            share_undesirable_logps_fell=known(outcome.undesirable_fell),
            separated=known(outcome.separated),
        )


class KLSummary(_Record):
    """KL(policy || reference) on the policy's own samples, in nats."""

    file: str
    step: int | None
    """Optimizer updates of the policy; null where the samples do not say."""
    samples: int
    prompts: int
    tokens: int
    share_unfinished: float | None
    k1_sequence: Bounds
    k1_token: Bounds
    k3_sequence: Bounds
    k3_token: Bounds
    rb_sequence: Bounds | None
    """Rao-Blackwellised; null in tables of versions that did not measure it."""
    rb_token: Bounds | None

    @classmethod
    def of(cls, kl: KLFile) -> "KLSummary":
        estimate = kl.estimate
        return cls(
            file=kl.file,
            step=kl.step,
            samples=estimate.samples,
            prompts=estimate.prompts,
            tokens=estimate.tokens,
            share_unfinished=known(estimate.unfinished.value),
            k1_sequence=Bounds.of(estimate.k1_sequence),
            k1_token=Bounds.of(estimate.k1_token),
            k3_sequence=Bounds.of(estimate.k3_sequence),
            k3_token=Bounds.of(estimate.k3_token),
            rb_sequence=None if estimate.rb_sequence is None else Bounds.of(estimate.rb_sequence),
            rb_token=None if estimate.rb_token is None else Bounds.of(estimate.rb_token),
        )


class RunSummary(_Record):
    """One run."""

    run: str
    """The folder, as given."""
    model: str | None
    loss_type: str | None
    beta: float
    finished: bool
    steps: int | None
    epochs: float | None
    first_loss: float | None
    final: dict[str, int | float | None]
    """The last training entry of metrics.jsonl; empty if there is none."""
    eval: dict[str, int | float | None]
    """The last evaluation; names keep their ``eval_``."""
    reference_ranking_accuracy: float | None
    """For all kept pairs, before any training."""
    scored: PairsSummary | None
    """All pairs under the scored checkpoint, from ``scores/``."""
    held_out: PairsSummary | None
    """Pairs that training did not see, under the scored checkpoint, or else at the last evaluation."""
    labelled: dict[str, LabelledSummary] | None
    """Of unpaired rows, in place of both: ``all``, ``training`` and ``held-out``, those that are known."""
    kl: KLSummary | None
    """The last file of ``kl/``."""
    frontier: JsonValue
    """Reward and KL of each measured policy, from ``dpo-opt frontier``."""
    parity: dict[str, bool | int | float | None] | None
    diagnosis: JsonValue
    """What ``dpo-opt diagnose`` says: verdict, findings with their evidence and the ids of their pairs."""
    movements: dict[str, float | None] | None
    """Share of the judged pairs in each quadrant of movement. Judged are the held-out pairs, or else all."""
    rankings: JsonValue
    """Reference margin against trained margin: quadrants with counts, mean margins and rows."""
    calibration: JsonValue
    lengths: JsonValue
    sources: JsonValue
    notable_pairs: dict[str, list[str]] | None
    """Identifiers of the pairs that the page shows, by list."""
    smallest_margin: float | None
    """5th percentile of the size of log-prob margins, in nats."""
    points: JsonValue
    """The pairs against steps: means, quantiles of log-ratios and their margin, shares of movements."""


class RunDifference(_Record):
    """A run minus the first run, on the pairs that both have final log-probs of."""

    run: str
    pairs: int
    prompts: int
    held_out: bool
    """Whether neither run was trained on any of these pairs."""
    reward_accuracy: Bounds
    ranking_accuracy: Bounds
    chosen_fell: Bounds

    @classmethod
    def of(cls, run: str, difference: Difference) -> "RunDifference":
        return cls(
            run=run,
            pairs=difference.pairs,
            prompts=difference.prompts,
            held_out=difference.held_out,
            reward_accuracy=Bounds.of(difference.reward_accuracy),
            ranking_accuracy=Bounds.of(difference.ranking_accuracy),
            chosen_fell=Bounds.of(difference.chosen_fell),
        )


class NotCompared(_Record):
    """A run that is not compared with the first one pair by pair."""

    run: str
    reason: str
    """In words."""


class Summary(_Record):
    """A report's numbers: one entry per run, in the order in which the runs were given."""

    written_by: str
    """What a later report knows this file by: it replaces no other."""
    runs: list[RunSummary]
    differences: list[RunDifference]
    """Of every later run, where it shares pairs with the first."""
    not_compared: list[NotCompared]
    """The later runs that have no such difference."""


def known(value: float | None) -> float | None:
    """The value, or None if it is not finite: JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


def known_values(values: Mapping[str, float]) -> dict[str, bool | int | float | None]:
    """The mapping, with None for every number that is not finite."""
    return {name: known(value) for name, value in values.items()}


def numbers_of(value: object) -> JsonValue:
    """Named tuples as objects and unknown numbers as null, as deep as they go."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return numbers_of(value._asdict())
    if isinstance(value, Mapping):
        return {str(name): numbers_of(of) for name, of in value.items()}
    if isinstance(value, list | tuple):
        return [numbers_of(of) for of in value]
    if isinstance(value, float):
        return known(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"{type(value).__name__} is no number of a report")
