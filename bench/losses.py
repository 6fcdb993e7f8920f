"""What each loss makes of the same pairs: held-out accuracy of a policy trained with it, from one cache.

    python bench/losses.py --data DATA --model MODEL --output FOLDER [--losses sigmoid ipo ...]

The pairs are real texts (``planted_pairs.tone``): of two sentences of film reviews, people called the chosen
one kind and the rejected one unkind. Of the pairs that no run trains on, one half chooses each loss's
learning rate among three, and the other half is reported. Accuracy is the share of pairs whose chosen
completion gained more log-prob over the reference than the rejected one, for losses without a reference too.
It is to be above the share of pairs that the reference ranks right.

Runs that are finished are not trained again.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple, get_args

import polars as pl
from planted_causes import command
from planted_pairs import tone

from dpo_opt.analysis.intervals import Interval, wilson
from dpo_opt.optimize.config import LossType
from dpo_opt.optimize.losses.preference_loss import UNPAIRED

TRAINED, HELD_OUT, SEED = 480, 316, 7
RATES = (1e-5, 1e-4, 1e-3)
# What a loss needs, or what its paper takes where that is far from our default.
OPTIONS: dict[str, dict[str, object]] = {
    "exo_pair": {"label_smoothing": 0.001},
    "rdpo": {"rdpo_alpha": 0.01},
    "robust": {"label_smoothing": 0.1},
    "sigmoid_norm": {"beta": 5.0},
    "simpo": {"beta": 5.0, "simpo_gamma": 1.0},
}


class Outcome(NamedTuple):
    """What a trained policy says of the reported half."""

    rate: float
    """The learning rate that the other half chose."""
    accuracy: Interval
    chosen: float
    """Mean log-ratio of chosen completions, in nats."""
    rejected: float


def main() -> None:
    """Train what was not trained before, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="folder of a small model")
    parser.add_argument("--output", type=Path, required=True, help="folder for shards and runs")
    parser.add_argument("--losses", nargs="+", choices=get_args(LossType), default=list(get_args(LossType)))
    arguments = parser.parse_args()
    prepare(arguments.data, arguments.model, arguments.output)
    ranked = held_out(arguments.output).filter("reported")
    right = (ranked["ref_chosen_logps"] > ranked["ref_rejected_logps"]).sum()
    print(f"the reference ranks {_shown(wilson(share=right / len(ranked), trials=len(ranked)))} right\n")
    print("| loss | learning rate | reward accuracy | chosen, nats | rejected, nats |\n|---|---|---|---|---|")
    for loss in arguments.losses:
        for rate in RATES:
            train(loss, rate, arguments.model, arguments.output)
        found = outcome(loss, arguments.output)
        columns = f"{_shown(found.accuracy)} | {found.chosen:+.2f} | {found.rejected:+.2f}"
        print(f"| `{loss}` | {found.rate:g} | {columns} |", flush=True)


def prepare(data: Path, model: Path, output: Path) -> None:
    """Score the pairs once, for all losses, and the same completions one by one, for losses of those."""
    output.mkdir(parents=True, exist_ok=True)
    pairs = [pair | {"margin": 1.0} for pair in tone(data, TRAINED + HELD_OUT, SEED)]
    single = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs[:TRAINED]
        for side in ("chosen", "rejected")
    ]
    for name, rows in (("train", pairs[:TRAINED]), ("test", pairs[TRAINED:]), ("single", single)):
        file = output / f"{name}.jsonl"
        if not file.is_file():
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        command("precompute", model=model, data=file, shards=output / name, backend="hf", dtype="float32")


def train(loss: str, rate: float, model: Path, output: Path) -> None:
    """Train a policy and score the held-out pairs with it, unless that is done."""
    run = _run(loss, rate, output)
    if (run / "test.parquet").is_file():
        return
    shards = output / ("single" if loss in UNPAIRED else "train")
    command(
        "train", "--resume", shards=shards, model=model, output_dir=run, loss_type=loss, learning_rate=rate,
        batch_size=20, dtype="float32", seed=SEED, save_minutes="inf", **OPTIONS.get(loss, {}),
    )  # fmt: skip
    command("score", shards=output / "test", model=run / "final", output=run / "test.parquet")


def outcome(loss: str, output: Path) -> Outcome:
    """The best learning rate by one half of the held-out pairs, judged by the other."""
    judged = {rate: _judged(_run(loss, rate, output), output) for rate in RATES}
    best = max(RATES, key=lambda rate: float(judged[rate].filter(~pl.col("reported"))["right"].mean()))  # type: ignore[arg-type]
    pairs = judged[best].filter("reported")
    chosen, rejected = (float(pairs[side].mean()) for side in ("chosen", "rejected"))  # type: ignore[arg-type]
    return Outcome(best, wilson(share=float(pairs["right"].mean()), trials=len(pairs)), chosen, rejected)


def held_out(output: Path) -> pl.DataFrame:
    """The reference's log-probs of the held-out pairs; every other pair is reported."""
    columns = ["row", "ref_chosen_logps", "ref_rejected_logps"]
    shards = pl.read_parquet(output / "test" / "data" / "*.parquet", columns=columns)
    return shards.with_columns(reported=pl.col("row") % 2 == 0)


def _judged(run: Path, output: Path) -> pl.DataFrame:
    scored = pl.read_parquet(run / "test.parquet", columns=["row", "chosen_logps", "rejected_logps"])
    chosen = pl.col("chosen_logps") - pl.col("ref_chosen_logps")
    rejected = pl.col("rejected_logps") - pl.col("ref_rejected_logps")
    joined = held_out(output).join(scored, on="row", how="inner", validate="1:1")
    return joined.with_columns(chosen=chosen, rejected=rejected, right=chosen > rejected)


def _run(loss: str, rate: float, output: Path) -> Path:
    return output / "runs" / f"{loss}-{rate:g}"


def _shown(share: Interval) -> str:
    return f"{share.value:.1%} [{share.low:.1%}, {share.high:.1%}]"


if __name__ == "__main__":
    main()
