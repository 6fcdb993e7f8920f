"""Every number of a run's summary once more, from the files alone, in plain NumPy and by other formulas."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

SIDES = ("chosen", "rejected")
Rows = list[dict[str, Any]]


def rows_of(folder: Path) -> Rows:
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def expected_entry(run: Path, shards: Path, *, beta: float, noise: float) -> dict[str, Any]:
    """What ``summary.json`` must say of the pairs of a scored run with held-out pairs."""
    pairs = {row["row"]: row for row in rows_of(shards / "data")}
    logged = rows_of(run / "pair_logps")
    held_out = {row["row"] for row in logged if row["phase"] == "eval"}
    scored = [joined(row, pairs, beta) for row in rows_of(run / "scores")]
    judging = [p for p in scored if p["row"] in held_out]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [m for m in metrics if "loss" in m]
    reference = [p["ref_chosen_logps"] - p["ref_rejected_logps"] for p in pairs.values()]
    return {
        "beta": beta,
        "first_loss": train[0]["loss"],
        "final": train[-1],
        "eval": next(m for m in reversed(metrics) if "eval_loss" in m),
        "reference_ranking_accuracy": np.mean(np.array(reference) > 0),
        "scored": split(scored, noise),
        "held_out": split(judging, noise),
        "movements": movements(judging, noise),
        "rankings": rankings(judging),
        "calibration": calibration(judging),
        "lengths": lengths(judging),
        "sources": sources(judging),
        "notable_pairs": notable(judging, logged, pairs, beta),
        "smallest_margin": np.quantile([abs(p["gain"]) for p in judging], 0.05),
        "points": points(logged, pairs, noise),
    }


def joined(row: dict[str, Any], pairs: dict[int, Any], beta: float) -> dict[str, Any]:
    pair = pairs[row["row"]]
    moved = {side: row[f"{side}_logps"] - pair[f"ref_{side}_logps"] for side in SIDES}
    after = row["chosen_logps"] - row["rejected_logps"]
    before = pair["ref_chosen_logps"] - pair["ref_rejected_logps"]
    return {
        **{name: pair[name] for name in ("row", "pair_id", "prompt_id", "source")},
        **moved,
        "step": row["step"],
        "phase": row["phase"],
        "before": before,
        "after": after,
        # The same margin, added up the other way round.
        "gain": after - before,
        "margin": beta * (after - before),
        "longer": row["chosen_length"] - row["rejected_length"],
    }


def share(pairs: Rows, holds: list[bool]) -> tuple[float, float, float]:
    """A share with Wilson's interval for the trials that its prompts are worth, by the definition of each."""
    by_prompt = defaultdict(list)
    for pair, right in zip(pairs, holds, strict=True):
        by_prompt[pair["prompt_id"]].append(right)
    value, clusters = sum(holds) / len(holds), len(by_prompt)
    if value in (0, 1) or clusters < 2:
        trials = clusters if clusters > 1 or value in (0, 1) else math.nan
    else:
        residuals = [sum(r - value for r in group) for group in by_prompt.values()]
        variance = clusters / (clusters - 1) * sum(r * r for r in residuals) / len(holds) ** 2
        worth = min(len(holds), value * (1 - value) / variance) if variance else len(holds)
        trials = worth * (1.959963984540054 / student_t(clusters - 1)) ** 2
    if math.isnan(trials):
        return value, math.nan, math.nan
    # The two solutions of |value - p| = z sqrt(p (1 - p) / trials) for p.
    z2 = 1.959963984540054**2 / trials
    low, high = sorted(np.roots([1 + z2, -(2 * value + z2), value**2]).real)
    return value, max(0.0, min(low, value)), min(1.0, max(high, value))


def student_t(freedom: int) -> float:
    """The 97.5% quantile, from the density by integration and bisection."""
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(
        freedom * math.pi
    )

    def above(t: float) -> float:
        x = np.linspace(0, t, 4001)
        density = constant * (1 + x * x / freedom) ** (-(freedom + 1) / 2)
        return 0.5 - float(np.trapezoid(density, x))

    low, high = 1.9, 13.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle) > 0.025 else (low, middle)
    return low


def interval(pairs: Rows, holds: list[bool]) -> dict[str, float]:
    return dict(zip(("value", "low", "high"), share(pairs, holds), strict=True))


def ratio(of: list[tuple[Any, float, float]]) -> dict[str, float]:
    """Sum over sum, of (prompt, numerator, denominator), with Student's t around it over the prompts."""
    by_prompt: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    for prompt, *terms in of:
        by_prompt[prompt].append((terms[0], terms[1]))
    total = sum(d for _, _, d in of)
    value, clusters = sum(n for _, n, _ in of) / total, len(by_prompt)
    residuals = [sum(n - value * d for n, d in group) for group in by_prompt.values()]
    # The standard deviation of the prompts' residuals, on the scale of the ratio.
    spread = math.sqrt(clusters) * float(np.std(residuals, ddof=1)) / total
    half = student_t(clusters - 1) * spread
    return {"value": value, "low": value - half, "high": value + half}


def mean(pairs: Rows, values: list[float]) -> dict[str, float]:
    return ratio([(p["prompt_id"], v, 1.0) for p, v in zip(pairs, values, strict=True)])


def split(pairs: Rows, noise: float) -> dict[str, Any]:
    value, low, high = share(pairs, [p["gain"] > 0 for p in pairs])
    return {
        "pairs": len(pairs),
        "prompts": len({p["prompt_id"] for p in pairs}),
        "reward_accuracy": value,
        "reward_accuracy_low": low,
        "reward_accuracy_high": high,
        "ranking_accuracy": np.mean([p["after"] > 0 for p in pairs]),
        "reference_ranking_accuracy": np.mean([p["before"] > 0 for p in pairs]),
        "mean_margin": np.mean([p["margin"] for p in pairs]),
        "share_chosen_logps_fell": np.mean([p["chosen"] < 0 for p in pairs]),
        "within_noise": sum(abs(p["gain"]) < 2 * noise for p in pairs),
    }


def movement(pair: dict[str, Any], noise: float) -> str:
    """By the angle at which a pair left the origin: rejected to the right, chosen upwards."""
    chosen, rejected = pair["chosen"], pair["rejected"]
    if max(abs(chosen), abs(rejected)) <= noise:
        return "unmoved"
    angle = math.degrees(math.atan2(chosen, rejected)) % 360
    names = {
        45: "both up, rejected more",
        90: "both up, chosen more",
        180: "chosen up, rejected down",
        # The margin is above what chosen lost while rejected fell more than twice as far.
        180 + math.degrees(math.atan(0.5)): "both down, gaining",
        270: "both down, losing",
        360: "chosen down, rejected up",
    }
    return next(name for bound, name in names.items() if angle <= bound)


MOVEMENTS = (
    "chosen up, rejected down",
    "both up, chosen more",
    "both down, gaining",
    "unmoved",
    "both up, rejected more",
    "both down, losing",
    "chosen down, rejected up",
)


def movements(pairs: Rows, noise: float) -> dict[str, float]:
    found = [movement(p, noise) for p in pairs]
    return {name: found.count(name) / len(found) for name in MOVEMENTS}


def rankings(pairs: Rows) -> Rows:
    kinds = (("stayed right", 1, 1), ("turned right", 0, 1), ("turned wrong", 1, 0), ("stayed wrong", 0, 0))
    found = []
    for name, before, after in kinds:
        members = [p for p in pairs if (p["before"] > 0) == before and (p["after"] > 0) == after]
        most = sorted(members, key=lambda p: (-abs(p["gain"]), p["row"]))[:5]
        found.append(
            {
                "name": name,
                "pairs": len(members),
                "share": len(members) / len(pairs),
                "mean_margin": sum(p["margin"] for p in members) / len(members) if members else None,
                "examples": [p["row"] for p in most],
            }
        )
    return found


def calibration(pairs: Rows) -> dict[str, Any]:
    size = np.array([abs(p["margin"]) for p in pairs])
    edges = np.unique(np.quantile(size, np.arange(1, 10) / 10))
    of = [sum(edge <= s for edge in edges) for s in size]
    groups = []
    for number in sorted(set(of)):
        members = [p for p, group in zip(pairs, of, strict=True) if group == number]
        right = [p["margin"] > 0 for p in members]
        confidence = np.mean([(1 + math.tanh(abs(p["margin"]) / 2)) / 2 for p in members])
        groups.append({"pairs": len(members), "confidence": confidence, "accuracy": interval(members, right)})
    gaps = [g["pairs"] * abs(g["accuracy"]["value"] - g["confidence"]) for g in groups]
    return {
        "groups": groups,
        "expected_error": sum(gaps) / len(pairs),
        "confidence": np.mean((1 + np.tanh(size / 2)) / 2),
        "accuracy": np.mean([p["margin"] > 0 for p in pairs]),
        "log_loss": np.mean([np.logaddexp(0, -p["margin"]) for p in pairs]),
    }


def lengths(pairs: Rows) -> dict[str, Any]:
    difference, margin = (np.array([p[name] for p in pairs], dtype=float) for name in ("longer", "margin"))
    groups = []
    parts = (("longer", difference > 0), ("shorter", difference < 0), ("as long", difference == 0))
    for name, members in parts:
        chosen = [p for p, member in zip(pairs, members, strict=True) if member]
        if chosen:
            groups.append(
                {
                    "name": name,
                    "pairs": len(chosen),
                    "reward_accuracy": np.mean([p["gain"] > 0 for p in chosen]),
                    "reference_ranking_accuracy": np.mean([p["before"] > 0 for p in chosen]),
                    "mean_margin": np.mean([p["margin"] for p in chosen]),
                }
            )
    return {
        "longer_chosen": (difference > 0).sum() / (difference != 0).sum(),
        "unequal_pairs": int((difference != 0).sum()),
        "correlation": np.corrcoef(difference, margin)[0, 1],
        "groups": groups,
    }


def sources(pairs: Rows) -> Rows:
    by_source = defaultdict(list)
    for pair in pairs:
        by_source[pair["source"]].append(pair)
    return [
        {
            "source": name,
            "pairs": len(of),
            "prompts": len({p["prompt_id"] for p in of}),
            "reward_accuracy": interval(of, [p["gain"] > 0 for p in of]),
            "ranking_accuracy": interval(of, [p["after"] > 0 for p in of]),
            "reference_ranking_accuracy": interval(of, [p["before"] > 0 for p in of]),
            "mean_margin": np.mean([p["margin"] for p in of]),
        }
        for name, of in sorted(by_source.items(), key=lambda item: (-len(item[1]), item[0]))
    ]


def notable(judging: Rows, logged: Rows, pairs: dict[int, Any], beta: float) -> dict[str, list[str]]:
    weights: dict[int, float] = defaultdict(float)
    for row in logged:
        if row["phase"] == "train":
            weights[row["row"]] += math.exp(-np.logaddexp(0, joined(row, pairs, beta)["margin"]))
    heaviest = sorted(weights, key=lambda row: (-weights[row], row))[:6]
    wrong = [p for p in judging if p["before"] > 0 >= p["after"]]
    right = [p for p in judging if p["after"] > 0 >= p["before"]]
    return {
        "worst": [p["pair_id"] for p in sorted(judging, key=lambda p: (p["margin"], p["row"]))[:6]],
        "drivers": [pairs[row]["pair_id"] for row in heaviest],
        "turned_wrong": [p["pair_id"] for p in sorted(wrong, key=lambda p: (p["gain"], p["row"]))[:3]],
        "turned_right": [p["pair_id"] for p in sorted(right, key=lambda p: (-p["gain"], p["row"]))[:3]],
    }


def points(logged: Rows, pairs: dict[int, Any], noise: float) -> Rows:
    steps = 1 + max(row["step"] for row in logged)
    groups = defaultdict(list)
    for row in logged:
        point = row["step"] * min(24, steps) // steps if row["phase"] == "train" else row["step"]
        groups[row["phase"], point].append(joined(row, pairs, 1.0))
    found = []
    for (phase, _), of in groups.items():
        values = {
            "chosen_logratio": [p["chosen"] for p in of],
            "rejected_logratio": [p["rejected"] for p in of],
            "margin": [p["gain"] for p in of],
        }
        found.append(
            {
                "phase": phase,
                "step": np.mean([p["step"] for p in of]),
                "pairs": len(of),
                "chosen_logratio": np.mean(values["chosen_logratio"]),
                "rejected_logratio": np.mean(values["rejected_logratio"]),
                "chosen_fell": np.mean([p["chosen"] < 0 for p in of]),
                **movements(of, noise),
                **{f"{n}_p{q}": np.percentile(v, q) for n, v in values.items() for q in (5, 25, 50, 75, 95)},
            }
        )
    return sorted(found, key=lambda p: (p["step"], p["phase"]))


def differences(expected: object, found: object, where: str = "") -> list[str]:
    """The places where two summaries disagree: other keys, lengths, words, or numbers beyond rounding."""
    if isinstance(expected, dict) and isinstance(found, dict):
        if set(expected) != set(found):
            return [f"{where}: keys {sorted(set(expected) ^ set(found))}"]
        return [d for key in expected for d in differences(expected[key], found[key], f"{where}/{key}")]
    if isinstance(expected, list) and isinstance(found, list):
        if len(expected) != len(found):
            return [f"{where}: {len(found)} instead of {len(expected)}"]
        parts = enumerate(zip(expected, found, strict=True))
        return [d for i, (one, other) in parts for d in differences(one, other, f"{where}/{i}")]
    if isinstance(expected, str | bool | None):
        return [] if expected == found else [f"{where}: {found!r} instead of {expected!r}"]
    if not isinstance(found, int | float):
        known = math.isfinite(float(expected))  # type: ignore[arg-type]
        return [f"{where}: {found!r} instead of {expected}"] if known or found is not None else []
    # Student's t of the report is good to a thousandth, and so is an interval's width.
    near = 1e-3 if where.endswith(("low", "high")) else 1e-7
    same = math.isclose(float(expected), found, rel_tol=near, abs_tol=near)  # type: ignore[arg-type]
    return [] if same else [f"{where}: {found} instead of {expected}"]
