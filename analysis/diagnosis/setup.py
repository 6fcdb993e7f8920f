"""Causes that lie in how a run was set up: its reference, its precision, its lengths.

Each function returns what it found, None if there is nothing, or why that is not known. Thresholds were set
on other seeds than those of the experiment that tests them (bench/planted_causes.py).
"""

import math
import re

import polars as pl

from dpo_opt.analysis import rewards
from dpo_opt.analysis.diagnosis.evidence import FEWEST, MOST_PAIRS, Evidence
from dpo_opt.analysis.diagnosis.finding import Finding, Measure, Missing, exact
from dpo_opt.analysis.intervals import wilson
from dpo_opt.analysis.outcomes import means_over_prompts
from dpo_opt.analysis.table_checks import without
from dpo_opt.schemas.errors import DataError, first_line
from dpo_opt.schemas.plain_data import json_of

_ANOTHER_REFERENCE = 0.01
"""Nats per token."""
_ROUNDING = 0.1
"""Twice the largest sd of a token's log-prob between bf16 engines (``optimize/parity.py``), in nats."""
_TRUNCATED = 0.2
"""Of the kept pairs."""
_LOST = 0.5
"""Of the margin that training had reached."""

_STEP_OF_DUMP = re.compile(r"not-finite-step-(\d{8,18})\.jsonl", re.ASCII)

REFERENCE_FREE = frozenset({"simpo", "cpo", "orpo", "sft", "unlikelihood"})


def wrong_reference(evidence: Evidence) -> Finding | Missing | None:
    """the policy differs from the reference before its first update"""
    start = evidence.start
    if not len(start):
        return Missing("the log-probs of the first step are not there")
    shift = rewards.distance_per_token()
    (moved,) = means_over_prompts(start, shift)
    bound = moved.value if math.isnan(moved.low) else moved.low
    (length,) = means_over_prompts(start, pl.min_horizontal("chosen_length", "rejected_length"))
    # Rounding errors of a completion's tokens cancel each other.
    limit = max(_ANOTHER_REFERENCE, _ROUNDING / math.sqrt(length.value))
    if not bound > limit:
        return None
    farthest = start.sort(shift, descending=True)["row"].to_list()
    return Finding(
        cause="wrong_reference",
        title="The cached log-probs are not those of the model that training began with",
        evidence=(
            Measure(
                "log-ratio of the first step's pairs, before any update",
                moved,
                "nats per token",
                f"0 where the policy begins as the reference, up to rounding; found above {limit:.2g}",
            ),
        ),
        rows=tuple(farthest),
        action="score the pairs again with the model that is trained (dpo-opt precompute --model MODEL), "
        "unless --reference-differs was meant",
    )


def values_not_finite(evidence: Evidence) -> Finding | Missing | None:
    """a loss or a gradient was not finite, and training stopped"""
    run = evidence.run
    dumps = {file: _STEP_OF_DUMP.fullmatch(file.name) for file in run.path.glob("not-finite-step-*.jsonl")}
    steps = {int(found[1]): file for file, found in dumps.items() if found}
    if not steps or run.finished:
        return None
    step, dump = max(steps.items())
    try:
        pairs = [json_of(line) for line in dump.read_text(encoding="utf-8").splitlines()]
        # Numbers that are not finite stand there as words.
        rows = [(isinstance(pair["loss"], float), pair["row"]) for pair in pairs]
        if not all(isinstance(row, int) and 0 <= row < 2**63 for _, row in rows):
            raise ValueError("a row is no number of a row")
    except (ValueError, KeyError, TypeError, IsADirectoryError) as error:
        raise DataError(
            f"not the pairs of a step, one JSON object in a line ({first_line(error)})",
            where=str(dump),
            why="they say why training stopped",
            fix=without(dump, called="other"),
        ) from error
    other = "" if run.config.get("dtype") == "float32" else ", or use --dtype float32"
    return Finding(
        cause="values_not_finite",
        title="Values were not finite: training stopped before an update that would destroy the policy",
        evidence=(
            Measure("step", exact(step)),
            Measure("pairs in it whose loss was not finite", exact(sum(not finite for finite, _ in rows))),
            Measure("pairs in it", exact(len(rows))),
        ),
        rows=tuple(row for _, row in sorted(rows)),
        action=f"lower --learning-rate to a tenth{other}",
    )


def precision_lost(evidence: Evidence) -> Finding | Missing | None:
    """what training learned is missing from the model that it saved"""
    final, evaluated = evidence.final, evidence.evaluated
    if final is None or not final.scored:
        if not evidence.run.saved:
            return Missing("no model is saved yet")
        return Missing(f"the saved model was not scored: {evidence.run.score_command}")
    if not len(evaluated):
        return Missing(
            "no held-out pair was evaluated while training, which the saved model could differ from"
        )
    if evidence.run.evals["step"].max() != final.step:
        return Missing("the model that was scored is not that of the last evaluation")
    saved_logps = final.pairs.select("row", saved_chosen="chosen_logps", saved_rejected="rejected_logps")
    # Only these rows, or the join would hold all pairs of the run.
    saved_logps = saved_logps.filter(pl.col("row").is_in(evaluated["row"].implode()))
    both = evaluated.lazy().join(saved_logps, on="row").collect(engine="streaming")
    if len(both) < FEWEST:
        return Missing("too few held-out pairs were scored")
    beta = evidence.run.beta
    trained = rewards.margin(beta=beta)
    saved = beta * (
        (pl.col("saved_chosen") - pl.col("ref_chosen_logps"))
        - (pl.col("saved_rejected") - pl.col("ref_rejected_logps"))
    )
    before, after, lost = means_over_prompts(both, trained, saved, trained - saved)
    if not (before.low > 0 and lost.low > _LOST * before.value):
        return None
    return Finding(
        cause="precision_lost",
        title="The saved model lacks what training had learned: its weights were rounded",
        evidence=(
            Measure("mean margin of held-out pairs at the last evaluation", before, "nats"),
            Measure("mean margin of the same pairs under the saved model", after, "nats"),
            Measure("lost", lost, "nats", f"found where more than {_LOST:.0%} is lost"),
        ),
        rows=tuple(both.sort(trained - saved, descending=True)["row"].to_list()),
        action="save in full precision (--save-dtype float32), or train with a higher --learning-rate",
    )


def truncated_completions(evidence: Evidence) -> Finding | Missing | None:
    """completions were cut off"""
    manifest = evidence.manifest
    if not manifest.kept:
        return Missing("no pair was kept")
    share = wilson(share=manifest.truncated / manifest.kept, trials=manifest.kept)
    if not share.low > _TRUNCATED:
        return None
    return Finding(
        cause="truncated_completions",
        title="Many completions are cut off: the policy learns from texts without their ends",
        evidence=(
            Measure("pairs with a completion that was cut", share, "%", f"found above {_TRUNCATED:.0%}"),
        ),
        rows=tuple(evidence.truncated_rows(MOST_PAIRS)),
        action="score again with a larger --max-length, or leave such pairs out with --truncation drop",
    )
