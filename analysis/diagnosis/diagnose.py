"""``dpo-opt diagnose``: asks for every known cause in turn, and says what was found and what was checked."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dpo_opt.analysis.diagnosis import labels, pace, setup
from dpo_opt.analysis.diagnosis.doubts import doubts
from dpo_opt.analysis.diagnosis.evidence import Evidence, gather
from dpo_opt.analysis.diagnosis.finding import Check, Diagnosis, Finding, Missing
from dpo_opt.analysis.final_state import FinalState
from dpo_opt.analysis.run_files import Run, open_run
from dpo_opt.analysis.slices import ShardSlice
from dpo_opt.analysis.table_checks import UNREADABLE, unreadable_of
from dpo_opt.analysis.unpaired_rows import require_pairs
from dpo_opt.schemas.errors import quoted

MOST_FINDINGS = 3

Cause = Callable[[Evidence], Finding | Missing | None]

CAUSES: tuple[Cause, ...] = (
    setup.values_not_finite,
    setup.wrong_reference,
    setup.precision_lost,
    pace.nothing_learnt,
    pace.learning_rate_too_high,
    labels.likelihood_displacement,
    pace.beta_too_low,
    pace.overfitting,
    labels.one_source_against,
    labels.length_exploited,
    labels.swapped_labels,
    setup.truncated_completions,
)
"""In the order in which they are to be mended: what changes the meaning of later numbers comes first."""


def diagnose(
    run: Run | Path | str, final: FinalState | None = None, slices: Sequence[ShardSlice] | None = None
) -> Diagnosis:
    """Look for every known cause of a bad run.

    Args:
        run: A run, or the folder that ``dpo-opt train`` wrote. It may be unfinished: what is missing is then
            named in :attr:`Diagnosis.checks`.
        final: The run's final state, where it is known already.
        slices: From ``shard_slices``, where they are known already.

    Raises:
        ConfigError: It is not a run folder, its shards are not found, or their rows are no pairs.
        DataError: A table is damaged, or its pairs are not those of the run's shards.
    """
    run = run if isinstance(run, Run) else open_run(run)
    require_pairs(run.shards, fix=f"dpo-opt report {quoted(run.path)} --output report.html")
    try:
        evidence = gather(run, final, slices)
        found = {cause: cause(evidence) for cause in CAUSES}
    except UNREADABLE as error:
        raise unreadable_of(run, error) from error
    findings = [result for result in found.values() if isinstance(result, Finding)][:MOST_FINDINGS]
    return Diagnosis(
        run=str(run.path),
        findings=tuple(evidence.named(finding) for finding in findings),
        checks=_checks(found),
        pairs=len(evidence.unseen),
        held_out=len(evidence.held_out),
        doubts=tuple(doubts(evidence)),
        unfinished=None if run.finished else run.resume_command,
    )


def _checks(found: Mapping[Cause, Finding | Missing | None]) -> tuple[Check, ...]:
    checks = []
    for cause, result in found.items():
        asked = " ".join((cause.__doc__ or "").split())
        if isinstance(result, Missing):
            checks.append(Check(cause=cause.__name__, asked=asked, result="unknown", reason=result.reason))
        else:
            checks.append(Check(cause=cause.__name__, asked=asked, result="found" if result else "clear"))
    return tuple(checks)
