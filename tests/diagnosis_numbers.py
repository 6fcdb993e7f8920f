"""The numbers behind each cause that a diagnosis finds, once more in NumPy and by other formulas."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from report_numbers import Rows, interval, mean, share

from dpo_opt.analysis.diagnosis.finding import Finding

Numbers = list[dict[str, float]]
SIDES = ("chosen", "rejected")


def numbers(finding: Finding) -> Numbers:
    """The values of its evidence with their bounds."""
    return [measure.value.as_record() for measure in finding.evidence]


def pairs_of(rows: Rows, beta: float) -> Rows:
    """Rows with both log-probs of policy and reference, with what the causes look at."""
    found = []
    for row in rows:
        moved = [row[f"{side}_logps"] - row[f"ref_{side}_logps"] for side in SIDES]
        per_token = [m / row[f"{side}_length"] for m, side in zip(moved, SIDES, strict=True)]
        margin = beta * (moved[0] - moved[1])
        found.append(
            {
                **row,
                "prompt_id": row["prompt"],
                "margin": margin,
                "right": margin > 0,
                "loss": float(np.logaddexp(0, -margin)),
                "moved": (abs(per_token[0]) + abs(per_token[1])) / 2,
                "longer": row["chosen_length"] - row["rejected_length"],
            }
        )
    return found


def counted(value: float) -> dict[str, float]:
    return {"value": value, "low": math.nan, "high": math.nan}


def right(pairs: Rows) -> dict[str, float]:
    return interval(pairs, [p["right"] for p in pairs])


def of(pairs: Rows, name: str) -> dict[str, float]:
    return mean(pairs, [abs(p[name]) for p in pairs])


def wilson(share_of: float, trials: int) -> dict[str, float]:
    """As for pairs that have no prompt in common."""
    z2 = 1.959963984540054**2 / trials
    low, high = sorted(np.roots([1 + z2, -(2 * share_of + z2), share_of**2]).real)
    return {"value": share_of, "low": low, "high": high}


def swapped(pairs: Rows) -> Numbers:
    middle = float(np.median([p["margin"] for p in pairs]))
    return [interval(pairs, [p["margin"] < -middle / 2 for p in pairs]), counted(middle)]


def by_length(pairs: Rows) -> Numbers:
    longer, shorter = ([p for p in pairs if sign * p["longer"] > 0] for sign in (1, -1))
    trials = len(longer) + len(shorter)
    return [right(longer), right(shorter), wilson(len(longer) / trials, trials)]


def against(pairs: Rows, source: str) -> Numbers:
    return [right([p for p in pairs if (p["source"] == source) == own]) for own in (True, False)]


def overfitting(seen: Rows, held_out: Rows, lowest: float) -> Numbers:
    return [right(seen), right(held_out), of(held_out, "loss"), counted(lowest), of(seen, "loss")]


EXPECTED: dict[str, Callable[[dict[str, Rows], Any], Numbers]] = {
    "wrong_reference": lambda parts, run: [of(parts["start"], "moved")],
    "nothing_learnt": lambda parts, run: [
        of(parts["fresh"], "margin"),
        of(parts["fresh"], "moved"),
        counted(run.config["learning_rate"]),
        counted(max(run.train["step"])),
    ],
    "learning_rate_too_high": lambda parts, run: [
        of(parts["fresh"], "loss"),
        of(parts["fresh"], "margin"),
        right(parts["fresh"]),
    ],
    "beta_too_low": lambda parts, run: [
        of(parts["fresh"], "moved"),
        of(parts["fresh"], "margin"),
        counted(run.beta),
    ],
    "overfitting": lambda parts, run: overfitting(
        parts["seen"], parts["evaluated"], min(run.evals["eval_loss"])
    ),
    "one_source_against": lambda parts, run: against(parts["fresh"], "c"),
    "length_exploited": lambda parts, run: by_length(parts["fresh"]),
    "swapped_labels": lambda parts, run: swapped(parts["fresh"]),
}
"""By cause, what its evidence must say of its frames; ``c`` is the source that was planted."""


def precision_lost(last: Rows, saved: Rows) -> Numbers:
    """Of the same held-out pairs at the last evaluation and under the saved model, in one order."""
    lost = [one["margin"] - two["margin"] for one, two in zip(last, saved, strict=True)]
    return [
        mean(last, [p["margin"] for p in last]),
        mean(saved, [p["margin"] for p in saved]),
        mean(last, lost),
    ]


def displacement(pairs: Rows, alike: Rows) -> Numbers:
    """Of all unseen pairs, and of those of them whose completions share nearly all tokens."""
    fell = [(p["chosen_logps"] - p["ref_chosen_logps"]) / p["chosen_length"] for p in alike]
    falling = dict(zip(("value", "low", "high"), share(alike, [f < 0 for f in fell]), strict=True))
    return [
        counted(len(alike) / len(pairs)),
        mean(alike, fell),
        falling,
        mean(alike, [p["margin"] for p in alike]),
    ]
