"""Whether ``dpo-opt triage`` finds flipped labels, and what weighting its suspects down is worth.

    python bench/triage.py --data DATA --model MODEL --output FOLDER [--scorer FOLDER ...]

Of 480 pairs of real texts (``planted_pairs.py``) the labels of a tenth are flipped, another tenth for each
seed. First table: how often a triage score of a flipped pair is above that of another pair (AUROC), under the
reference that is trained, all seeds together, and under each ``--scorer`` for the first seed. Second table: a
policy is trained on the pairs as labelled, without triage's suspects, and without the flipped pairs, which
nothing but the experiment knows: what a perfect triage would be worth. 316 held-out pairs, whose labels are
never flipped, judge each policy. ``human`` is not trained on: a model of this size learns nothing from it
that holds for new pairs.

What is scored or trained is not done again.
"""

import argparse
import itertools
import json
import random
import shutil
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from planted_causes import command
from planted_pairs import answers, human, swapped, tone

from dpo_opt.analysis import rewards
from dpo_opt.analysis.intervals import (
    FloatArray,
    IntArray,
    Interval,
    cluster_starts,
    ratio_interval,
    share_interval,
)
from dpo_opt.analysis.slices import kept_pairs
from dpo_opt.schemas.sidecars import WEIGHT, Column, write_column

TASKS = {"human": human, "answers": answers, "tone": tone}
TRAINED_ON = ("answers", "tone")
TRAINED, HELD_OUT, FLIPPED = 480, 316, 48
SCORES = {
    "reference margin": -pl.col("reference_margin"),
    "difference of log-perplexities": pl.col("perplexity_difference"),
    "token overlap": pl.col("token_overlap"),
}
"""Of what triage writes, the higher the more suspect. The overlap knows no label: it is the control."""
AS_LABELLED, WITHOUT_SUSPECTS, WITHOUT_FLIPPED = "as labelled", "without suspects", "without flipped"
ARMS = (AS_LABELLED, WITHOUT_SUSPECTS, WITHOUT_FLIPPED)


def main() -> None:
    """Train and score what was not before, then print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="folder of the small model that is trained")
    parser.add_argument("--output", type=Path, required=True, help="folder for shards and runs")
    parser.add_argument("--scorer", type=Path, nargs="*", default=[], help="folders of other references")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args()
    model, output, seeds = arguments.model, arguments.output, arguments.seeds
    for task, seed in itertools.product(TASKS, seeds):
        write_pairs(task, seed, arguments.data, output)
        triaged(task, seed, model, output)
    for task, seed, arm in itertools.product(TRAINED_ON, seeds, ARMS):
        train(arm, task, seed, model, output)
    for task, scorer in itertools.product(TASKS, arguments.scorer):
        triaged(task, seeds[0], scorer, output)
    print("\n".join(found_table(output, model, arguments.scorer, seeds)))
    print("\n".join(["", *gain_table(output, seeds)]))


def found_table(output: Path, model: Path, scorers: Sequence[Path], seeds: Sequence[int]) -> list[str]:
    """How well each score finds the flipped pairs: the model's of all seeds, others' of the first."""
    lines = ["| pairs | reference | score | AUROC |", "|---|---|---|---|"]
    for task, reference in itertools.product(TASKS, (model, *scorers)):
        judged = seeds if reference == model else seeds[:1]
        found = pl.concat([triaged(task, seed, reference, output) for seed in judged])
        for name, score in SCORES.items():
            area = auroc_of(found.select("prompt", "flipped", score=score))
            lines.append(
                f"| {task} | {reference.name} | {name} | {area.value:.3f} [{area.low:.3f}, {area.high:.3f}] |"
            )
    return lines


def gain_table(output: Path, seeds: Sequence[int]) -> list[str]:
    """What each way to train made of the held-out pairs."""
    lines = [
        "| pairs | trained | held-out accuracy | gain over as labelled | each seed's |",
        "|---" * 5 + "|",
    ]
    for task, arm in itertools.product(TRAINED_ON, ARMS):
        lines.append(f"| {task} | {arm} | {' | '.join(outcome(arm, task, seeds, output))} |")
    return lines


def write_pairs(task: str, seed: int, data: Path, output: Path) -> None:
    """The pairs of a seed: those to train on, a tenth with their labels flipped, and held-out ones."""
    folder = _folder(output, task, seed)
    folder.mkdir(parents=True, exist_ok=True)
    pairs = TASKS[task](data, TRAINED + HELD_OUT, seed)
    flips = flipped(seed)
    train = [swapped(pair) if row in flips else pair for row, pair in enumerate(pairs[:TRAINED])]
    for name, rows in (("train", train), ("test", pairs[TRAINED:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def flipped(seed: int) -> set[int]:
    """Rows of a seed whose labels are flipped."""
    return set(random.Random(f"flips of {seed}").sample(range(TRAINED), FLIPPED))


def triaged(task: str, seed: int, reference: Path, output: Path) -> pl.DataFrame:
    """What triage says of each pair under a reference, its ``prompt``, and whether it is ``flipped``."""
    folder = _folder(output, task, seed)
    found = folder / f"{reference.name}.parquet"
    if not found.is_file():
        shards = folder / f"{reference.name}-train"
        score_reference(reference, folder / "train.jsonl", shards)
        command("triage", shards=shards, suspects=FLIPPED / TRAINED, output=found)
    pairs = _with_prompts(pl.read_parquet(found), folder / "train.jsonl")
    return pairs.with_columns(flipped=pl.col("row").is_in(sorted(flipped(seed))))


def score_reference(model: Path, pairs: Path, shards: Path) -> None:
    command("precompute", model=model, data=pairs, shards=shards, backend="hf", dtype="float32", processes=1)


def train(arm: str, task: str, seed: int, model: Path, output: Path) -> None:
    """Train a policy, and score the held-out pairs with it, unless that is done."""
    folder = _folder(output, task, seed)
    run, test = _run(folder, arm), folder / "test"
    if (run / "test.parquet").is_file():
        return
    if not (test / "manifest.json").is_file():
        score_reference(model, folder / "test.jsonl", test)
    shards = run.with_name(f"{run.name}-shards")
    shutil.rmtree(shards, ignore_errors=True)
    shutil.copytree(folder / f"{model.name}-train", shards)
    if arm == WITHOUT_SUSPECTS:
        suspects = FLIPPED / TRAINED
        command("triage", shards=shards, suspects=suspects, write_weights="suspect_label", weight=0)
    elif arm == WITHOUT_FLIPPED:
        rows = sorted(flipped(seed))
        write_column(shards, WEIGHT, Column(array("q", rows), array("d", [0.0] * len(rows))))
    command(
        "train", "--resume", shards=shards, model=model, output_dir=run, learning_rate=1e-3, batch_size=20,
        dtype="float32", seed=seed, save_minutes="inf",
    )  # fmt: skip
    command("score", shards=test, model=run / "final", output=run / "test.parquet")


def outcome(arm: str, task: str, seeds: Sequence[int], output: Path) -> list[str]:
    """Held-out accuracy over all seeds, its gain over ``AS_LABELLED`` pair by pair, and that of each seed."""
    judged = pl.concat(
        [
            held_out(folder, arm).join(held_out(folder, AS_LABELLED), on="prompt", suffix="_as_labelled")
            for folder in (_folder(output, task, seed) for seed in seeds)
        ]
    )
    gain = (pl.col("right").cast(float) - pl.col("right_as_labelled").cast(float)).alias("gain")
    accuracy, gained = (pl.col(name).sum().cast(float) for name in ("right", "gain"))
    by_prompt = judged.with_columns(gain).group_by("prompt").agg(accuracy, gained, pairs=pl.len().cast(float))
    pairs = by_prompt["pairs"].to_numpy()
    shares = share_interval(successes=by_prompt["right"].to_numpy(), trials=pairs)
    if arm == AS_LABELLED:
        return [_percent(shares), "", ""]
    gains = ratio_interval(numerators=by_prompt["gain"].to_numpy(), denominators=pairs)
    each = judged.with_columns(gain).group_by("folder", maintain_order=True).agg(pl.col("gain").mean())
    return [_percent(shares), _percent(gains, sign="+"), ", ".join(f"{value:+.1%}" for value in each["gain"])]


def held_out(folder: Path, arm: str) -> pl.DataFrame:
    """Every held-out pair: ``folder``, ``prompt``, and whether its margin over the reference is ``right``."""
    reference = kept_pairs(folder / "test", "row", "ref_chosen_logps", "ref_rejected_logps")
    scored = pl.read_parquet(
        _run(folder, arm) / "test.parquet", columns=["row", "chosen_logps", "rejected_logps"]
    )
    joined = _with_prompts(reference.join(scored, on="row", validate="1:1"), folder / "test.jsonl")
    return joined.select(pl.lit(folder.name).alias("folder"), "prompt", rewards.accuracy().alias("right"))


def auroc_of(pairs: pl.DataFrame) -> Interval:
    """:func:`auroc` of the columns ``score`` and ``flipped``, with prompts as clusters."""
    pairs = pairs.sort("prompt")
    score, flips, prompt = (pairs[name].to_numpy() for name in ("score", "flipped", "prompt"))
    return auroc(score, flips, starts=cluster_starts(prompt))


def auroc(scores: FloatArray, positive: np.ndarray, *, starts: IntArray) -> Interval:
    """How often a positive's score is above a negative's, ties counting half, with a 95% interval.

    The interval is DeLong's, with sums over clusters in place of single observations (Obuchowski 1997,
    "Nonparametric analysis of clustered ROC curve data", Biometrics 53).

    Args:
        scores: (N,) scores, clusters one after the other.
        positive: (N,) Booleans, with some of either kind.
        starts: (U,) where each cluster begins.
    """
    ordered = {kind: np.sort(scores[positive == kind]) for kind in (True, False)}
    # Of each observation: the share of the other kind that it stands above, ties counting half.
    above = np.empty(len(scores))
    for kind in (True, False):
        others, mine = ordered[not kind], scores[positive == kind]
        places = np.searchsorted(others, mine, "left") + np.searchsorted(others, mine, "right")
        above[positive == kind] = places / (2 * len(others))
    right = np.where(positive, above, 1 - above)
    value = float(right[positive].mean())
    counts = np.where(positive, positive.sum(), (~positive).sum())
    sums = np.add.reduceat((right - value) / counts, starts)
    clusters = len(starts)
    half = 1.96 * float(np.sqrt(clusters / (clusters - 1) * np.square(sums).sum()))
    return Interval(value, max(0.0, value - half), min(1.0, value + half))


def _with_prompts(pairs: pl.DataFrame, file: Path) -> pl.DataFrame:
    prompts = pl.Series("prompt", [json.loads(line)["prompt"] for line in file.read_text().splitlines()])
    return pairs.with_columns(prompts.gather(pairs["row"]))


def _folder(output: Path, task: str, seed: int) -> Path:
    return output / task / f"seed-{seed}"


def _run(folder: Path, arm: str) -> Path:
    return folder / arm.replace(" ", "-")


def _percent(value: Interval, *, sign: str = "") -> str:
    return f"{value.value:{sign}.1%} [{value.low:{sign}.1%}, {value.high:{sign}.1%}]"


if __name__ == "__main__":
    main()
