"""From pairs to a trained policy: reference log-probs and training together, against TRL, side by side.

    python bench/end_to_end.py --model MODEL --pairs PAIRS.jsonl [--quick] [--trl-python TRL_ENV/bin/python]
    python bench/end_to_end.py --model MODEL --pairs PAIRS.jsonl --against CHECKOUT --rounds 3

All sides train one epoch on the same pairs from the same weights, in fp32 on the CPU, as many pairs a step.
dpo-opt and TRL's precompute score the reference first, once; TRL's online reference runs beside the policy in
every step. TRL runs as it ships and at its fastest known. Every contender is a process of its own (dpo-opt
two), and contenders take turns. ``--quick`` leaves TRL as it ships out, which takes most of the time.

Start-up (interpreter, imports, loading, what the check of cached log-probs computes beside the first
step, and its saving at the end) has its own column and is in no other. Tokenizing, writing and checking
the shards count as precompute. "First step" and "first update" are seconds from the command that trains to
the first step's begin and end, without precompute.

With ``--against`` only the start of this code and that of CHECKOUT, an older copy of this repository, are
compared: both train one step on the same shards.

The break-even is the number of epochs after which precompute has paid for itself: its time over the time that
an epoch saves. Times of several epochs are extrapolated from the one that was measured.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import trl_side
from sides import Trained, command_line, do_job, run_job, train_ours, write_pairs

OURS, OLDER = "dpo-opt", "dpo-opt, the other checkout"
EPOCHS = (1, 2, 3, 5)
SHIPS = {"micro_batch": 8, "checkpointing": True}
FASTEST = {"micro_batch": 1, "checkpointing": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "TRL online, as it ships": {**SHIPS, "precompute": False},
    "TRL precomputed, as it ships": {**SHIPS, "precompute": True},
    "TRL online, micro-batch 1": {**FASTEST, "precompute": False},
    "TRL precomputed, micro-batch 1": {**FASTEST, "precompute": True},
}


def main() -> None:
    """Run every contender in turn and print the tables."""
    parser = command_line(__doc__)
    parser.add_argument("--count", type=int, default=32, help="pairs of the epoch")
    parser.add_argument("--quick", action="store_true", help="TRL at its fastest known alone")
    parser.add_argument("--against", type=Path, help="a checkout of other code: only the start is compared")
    arguments = parser.parse_args()
    if do_job(arguments, {"precompute": _precompute, "train": _train, "trl": _trl}):
        return
    if arguments.against:
        _compare_starts(arguments)
        return
    tried = {name: one for name, one in SETTINGS.items() if not (arguments.quick and "ships" in name)}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in (OURS, *tried)}
    for _ in range(arguments.rounds):
        for name, found in results.items():
            # A folder for each, so that nobody finds what was scored before.
            with tempfile.TemporaryDirectory() as folder:
                arguments.folder = Path(folder)
                write_pairs(arguments.pairs, arguments.folder / "pairs.jsonl", arguments.count)
                if name == OURS:
                    found.append(_add(_run(arguments, "precompute"), _run(arguments, "train")))
                else:
                    found.append(_run(arguments, "trl", **tried[name]))
            _say(name, found[-1])
    _print_tables({name: _least(found) for name, found in results.items()}, arguments)


def _compare_starts(arguments: argparse.Namespace) -> None:
    """Run this code and the other checkout's in turns, and print how long each took to its first update."""
    results: dict[str, list[dict[str, float]]] = {OURS: [], OLDER: []}
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = Path(folder)
        write_pairs(arguments.pairs, arguments.folder / "pairs.jsonl", arguments.count)
        _run(arguments, "precompute")
        for _ in range(arguments.rounds):
            for name, found in results.items():
                checkout = arguments.against if name == OLDER else None
                found.append(_run(arguments, "train", checkout=checkout, max_steps=1))
                _say(name, found[-1])
    least = {name: _least(found) for name, found in results.items()}
    print(f"\n{arguments.pairs_per_step} pairs a step; seconds from the command, the least of each\n")
    print("| contender | begin of the first step | end of the first update | peak GB |\n|---|---|---|---|")
    for name, one in least.items():
        print(f"| {name} | {one['first_step']:.1f} | {one['first_update']:.1f} | {one['peak_gb']:.2f} |")
    ours, theirs = least[OURS], least[OLDER]
    step, update, peak = (ours[key] / theirs[key] for key in ("first_step", "first_update", "peak_gb"))
    print(f"| ours to theirs | {step:.3f}x | {update:.3f}x | {peak:.2f}x |")


def _run(
    arguments: argparse.Namespace, job: str, *, checkout: Path | None = None, **settings: Any
) -> dict[str, float]:
    """Seconds of precompute, of the epoch and of all the rest, and the peak of memory."""
    began = time.perf_counter()
    found, measured = run_job(arguments, job, checkout=checkout, **settings)
    start_up = measured.seconds - found["precompute"] - found["epoch"]
    if "first_step" in found:
        # The clock of Linux is the same in all processes.
        for mark in ("first_step", "first_update"):
            found[mark] -= began + found["precompute"]
    return {
        "first_step": 0.0,
        "first_update": 0.0,
        **found,
        "start_up": start_up,
        "peak_gb": measured.gigabytes,
    }


def _say(name: str, found: dict[str, float]) -> None:
    rounded = {key: round(value, 2) for key, value in found.items()}
    print(f"{name}: {rounded}", file=sys.stderr, flush=True)


def _add(first: dict[str, float], then: dict[str, float]) -> dict[str, float]:
    return {key: (max if key == "peak_gb" else sum)((first[key], then[key])) for key in first}


def _least(found: list[dict[str, float]]) -> dict[str, float]:
    """Of several rounds the shortest times: what disturbs a machine only ever adds."""
    return {key: (max if key == "peak_gb" else min)(one[key] for one in found) for key in found[0]}


def _precompute(arguments: argparse.Namespace) -> dict[str, float]:
    from dpo_opt.precompute import PrecomputeConfig, precompute
    from dpo_opt.scorers import make_scorer

    config = PrecomputeConfig(
        model=str(arguments.model), data=arguments.folder / "pairs.jsonl",
        shards=arguments.folder / "shards", dtype="float32",
    )  # fmt: skip
    scorer = make_scorer(config)
    began = time.perf_counter()
    precompute(config, scorer=scorer)
    return {"precompute": time.perf_counter() - began, "epoch": 0.0}


def _train(arguments: argparse.Namespace, **settings: Any) -> dict[str, float]:
    return _took(train_ours(arguments, **settings))


def _trl(
    arguments: argparse.Namespace, *, micro_batch: int, checkpointing: bool, precompute: bool
) -> dict[str, float]:
    found = trl_side.train(
        arguments.model, arguments.folder / "pairs.jsonl", arguments.folder / "trl", order=None,
        pairs_per_step=arguments.pairs_per_step, micro_batch=micro_batch, checkpointing=checkpointing,
        precompute=precompute,
    )  # fmt: skip
    return _took(found)


def _took(trained: Trained) -> dict[str, float]:
    return {
        "precompute": trained.preparing, "epoch": trained.ends[-1] - trained.began,
        "first_step": trained.began, "first_update": trained.ends[0],
    }  # fmt: skip


def _print_tables(results: dict[str, dict[str, float]], arguments: argparse.Namespace) -> None:
    def seconds(name: str, epochs: float) -> float:
        return results[name]["precompute"] + epochs * results[name]["epoch"]

    print(f"\n{arguments.count} pairs, {arguments.pairs_per_step} a step; seconds\n")
    print(
        "| contender | precompute | one epoch | together | theirs to ours | start-up | first step "
        "| first update | peak GB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, one in results.items():
        print(
            f"| {name} | {one['precompute']:.1f} | {one['epoch']:.1f} | {seconds(name, 1):.1f} "
            f"| {seconds(name, 1) / seconds(OURS, 1):.2f}x | {one['start_up']:.1f} "
            f"| {one['first_step']:.1f} | {one['first_update']:.1f} | {one['peak_gb']:.1f} |"
        )
    online = [name for name in results if "online" in name]
    print("\n| precompute of | pays for itself, against | after epochs |\n|---|---|---|")
    for name in [OURS, *(name for name in results if "precomputed" in name)]:
        for other in online:
            saved = results[other]["epoch"] - results[name]["epoch"]
            extra = results[name]["precompute"] - results[other]["precompute"]
            print(f"| {name} | {other} | {f'{max(0.0, extra / saved):.2f}' if saved > 0 else 'never'} |")
    print("\n| epochs (from the time of one) | " + " | ".join(f"{n}" for n in EPOCHS) + " |")
    print("|---|" + "---|" * len(EPOCHS))
    for name in results:
        ratios = (f"{seconds(name, n) / seconds(OURS, n):.2f}x" for n in EPOCHS)
        print(f"| {name}, theirs to ours | " + " | ".join(ratios) + " |")
    nearest = min(seconds(name, 1) / seconds(OURS, 1) for name in results if name != OURS)
    print(f"\nahead at one epoch: {nearest:.2f}x the nearest contender: {'ok' if nearest > 1 else 'short'}")


if __name__ == "__main__":
    main()
