"""KL figures and the differences of two runs once more, from the files alone and by other formulas."""

import math
from pathlib import Path
from typing import Any

from report_numbers import joined, mean, ratio, rows_of, share


def expected_kl(table: Path, *, step: int | None) -> dict[str, Any]:
    """What ``summary.json`` must say of a table of samples that has both models' distributions."""
    samples = [row for row in rows_of(table.parent) if row["policy_token_logps"]]
    ratios = [
        [p - r for p, r in zip(s["policy_token_logps"], s["ref_token_logps"], strict=True)] for s in samples
    ]
    totals = {
        "k1": [math.fsum(of) for of in ratios],
        # exp(-r) - 1 + r without its cancellation near 0.
        "k3": [math.fsum(math.expm1(-r) + r for r in of) for of in ratios],
        "rb": [math.fsum(s["token_kl"]) for s in samples],
    }
    lengths = [float(len(of)) for of in ratios]
    units = {"sequence": [1.0] * len(samples), "token": lengths}
    return {
        "file": table.name,
        "step": step,
        "samples": len(samples),
        "prompts": len({s["prompt_id"] for s in samples}),
        "tokens": int(sum(lengths)),
        "share_unfinished": share(samples, [not s["finished"] for s in samples])[0],
        **{
            f"{name}_{unit}": ratio(list(zip([s["prompt_id"] for s in samples], of, per, strict=True)))
            for name, of in totals.items()
            for unit, per in units.items()
        },
    }


def expected_difference(run: Path, first: Path, shards: Path) -> dict[str, Any]:
    """What ``summary.json`` must say of a scored run beside the first one, on the held-out pairs of both."""
    pairs = {row["row"]: row for row in rows_of(shards / "data")}

    def held_out(folder: Path) -> dict[int, Any]:
        unseen = {row["row"] for row in rows_of(folder / "pair_logps") if row["phase"] == "eval"}
        scored = (joined(row, pairs, 1.0) for row in rows_of(folder / "scores"))
        return {pair["row"]: pair for pair in scored if pair["row"] in unseen}

    own, other = held_out(run), held_out(first)
    rows = sorted(own.keys() & other.keys())
    both = [own[row] for row in rows]

    def gain(name: str, sign: int = 1) -> dict[str, float]:
        holds = [((sign * own[row][name] > 0), (sign * other[row][name] > 0)) for row in rows]
        return mean(both, [float(one) - float(two) for one, two in holds])

    return {
        "run": run.name,
        "pairs": len(rows),
        "prompts": len({pair["prompt_id"] for pair in both}),
        "held_out": True,
        "reward_accuracy": gain("gain"),
        "ranking_accuracy": gain("after"),
        "chosen_fell": gain("chosen", -1),
    }
