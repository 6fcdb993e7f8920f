"""Training speed and peak memory against TRL, side by side in one run: the ratios of BENCHMARKS.md.

    python bench/train.py --model MODEL --pairs PAIRS.jsonl [--quick] [--trl-python TRL_ENV/bin/python]

All sides train the same pairs, the same ones in each step, from the same weights with AdamW, in fp32 on the
CPU. Each contender is a process of its own, and contenders take turns. TRL runs as it ships (micro-batch 8,
gradient checkpointing) and with every other combination of gradient checkpointing and micro-batch, and each
once more with the pairs in order of their length, so that it pads little. ``--quick`` leaves all out but the
first and the fastest known.

What is not counted: start-up, the first step, and scoring the reference, which both sides do beforehand in
another process. Memory is the highest resident size of the whole process, start-up included. The arithmetic
is the floating-point operations that the model needs (none counted twice for being done twice) per second,
against those of the best 2048^3 matrix product on as many threads, measured before every contender.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import trl_side
from sides import SEED, Trained, command_line, do_job, run_job, train_ours, write_pairs

OURS = "dpo-opt"
AS_IT_SHIPS = "TRL as it ships: micro-batch 8, gradient checkpointing"
FASTEST_KNOWN = "TRL, micro-batch 1"


# What the project holds: pairs/s at least and peak memory at most, ours to theirs.
HOLD_AS_IT_SHIPS = (5.0, 0.4)
HOLD_FASTEST = (2.5, 2 / 3)
HOLD_ARITHMETIC = 0.7


def settings() -> dict[str, dict[str, Any]]:
    """Every setting of TRL that is tried. Sorting changes nothing where pairs go one at a time."""
    found = {}
    for by_length, checkpointing, size in itertools.product((False, True), (True, False), (8, 4, 2, 1)):
        if by_length and size == 1:
            continue
        name = f"TRL, micro-batch {size}" + ", gradient checkpointing" * checkpointing
        name = AS_IT_SHIPS if (by_length, checkpointing, size) == (False, True, 8) else name
        found[name + ", sorted by length" * by_length] = {
            "micro_batch": size, "checkpointing": checkpointing, "by_length": by_length,
        }  # fmt: skip
    return found


def main() -> None:
    """Run every contender in turn and print the tables."""
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=int, default=3, help="counted steps, after one that is not")
    parser.add_argument("--quick", action="store_true", help="TRL as it ships and at its fastest known alone")
    arguments = parser.parse_args()
    if do_job(arguments, {"prepare": _prepare, "gemm": _gemm, "ours": _ours, "trl": _trl}):
        return
    tried = settings()
    if arguments.quick:
        tried = {name: tried[name] for name in (AS_IT_SHIPS, FASTEST_KNOWN)}
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = Path(folder)
        count = arguments.pairs_per_step * (arguments.steps + 1)
        write_pairs(arguments.pairs, arguments.folder / "pairs.jsonl", count)
        facts, _ = run_job(arguments, "prepare")
        run_job(arguments, "trl", **next(iter(tried.values())))
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in (OURS, *tried)}
        rates = []
        for _ in range(arguments.rounds):
            for name, found in results.items():
                rates.append(run_job(arguments, "gemm")[0]["per_second"])
                found.append(_contend(arguments, tried.get(name)))
                print(f"{name}: {found[-1]}, GEMM {rates[-1] / 1e9:.0f} GFLOP/s", file=sys.stderr, flush=True)
    _print_tables(results, facts, max(rates), arguments)


def _contend(arguments: argparse.Namespace, setting: dict[str, Any] | None) -> dict[str, Any]:
    """One contender's run, ours where there is no setting of TRL; nothing where TRL did not end."""
    job = "trl" if setting else "ours"
    try:
        found, measured = run_job(arguments, job, **(setting or {}))
    except SystemExit as failed:
        if job == "ours":
            raise
        print(f"{setting}: {failed}", file=sys.stderr, flush=True)  # out of memory, for one
        return {}
    return {"peak_gb": round(measured.gigabytes, 2), **found}


def _prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Score the reference, fix the order of the pairs, and count what the steps need."""
    from gpu_tasks import model_flops
    from transformers import AutoConfig

    from dpo_opt.optimize.stream import PairStream
    from dpo_opt.optimize.transformers_scorer import HfScorer
    from dpo_opt.precompute import PrecomputeConfig, precompute
    from dpo_opt.schemas.shard_folder import ShardFolder

    shards = arguments.folder / "shards"
    precompute(
        PrecomputeConfig(
            model=str(arguments.model), data=arguments.folder / "pairs.jsonl", shards=shards, dtype="float32"
        ),
        scorer=HfScorer(arguments.model, dtype="float32"),
    )
    stream = PairStream(ShardFolder.open(shards), eval_split=0)
    pairs = stream.fetch(stream.epoch(seed=SEED, epoch=0))
    size = arguments.pairs_per_step
    if len(pairs) != size * (arguments.steps + 1):
        raise SystemExit(f"only {len(pairs)} pairs were kept: leave out those that are too long")
    order = [pair.row for pair in pairs]
    longest = {
        pair.row: len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs
    }
    # The step that is not counted stays the first, so that all count the same pairs.
    by_length = order[:size] + sorted(order[size:], key=lambda row: -longest[row])
    (arguments.folder / "orders.json").write_text(json.dumps([order, by_length]))

    config = AutoConfig.from_pretrained(arguments.model).get_text_config()
    flops = model_flops(config, *pairs[size:])
    tokens = [sum(map(len, column)) / len(pairs) for column in zip(*(
        (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in pairs
    ), strict=True)]  # fmt: skip
    prompt_and_completions = [round(number) for number in tokens]
    return {"flops": flops, "tokens": prompt_and_completions}


def _gemm(_: argparse.Namespace) -> dict[str, Any]:
    """The best of many products of two square matrices."""
    import torch

    a, b = torch.randn(2, 2048, 2048)
    best = float("inf")
    for _ in range(20):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return {"per_second": 2 * 2048**3 / best}


def _ours(arguments: argparse.Namespace) -> dict[str, Any]:
    return _counted(train_ours(arguments))


def _trl(
    arguments: argparse.Namespace, *, micro_batch: int, checkpointing: bool, by_length: bool
) -> dict[str, Any]:
    order = json.loads((arguments.folder / "orders.json").read_text())[by_length]
    found = trl_side.train(
        arguments.model, arguments.folder / "pairs.jsonl", arguments.folder / "trl", order=order,
        pairs_per_step=arguments.pairs_per_step, micro_batch=micro_batch, checkpointing=checkpointing,
        precompute=True, precompute_batch=1,
    )  # fmt: skip
    return _counted(found)


def _counted(trained: Trained) -> dict[str, Any]:
    """All steps but the first."""
    steps = [round(b - a, 3) for a, b in itertools.pairwise(trained.ends)]
    losses = [round(loss, 6) for loss in trained.losses]
    return {"seconds": round(sum(steps), 3), "steps": steps, "losses": losses}


def _print_tables(
    results: dict[str, list[dict[str, Any]]],
    facts: dict[str, Any],
    rate: float,
    arguments: argparse.Namespace,
) -> None:
    ran = {name: runs for name, found in results.items() if (runs := [run for run in found if run])}
    # The least of a contender's rounds: what disturbs a machine only ever adds.
    seconds = {name: min(run["seconds"] for run in runs) for name, runs in ran.items()}
    peaks = {name: max(run["peak_gb"] for run in runs) for name, runs in ran.items()}
    count = arguments.pairs_per_step * arguments.steps
    prompt, chosen, rejected = facts["tokens"]
    print(
        f"\n{count} pairs in {arguments.steps} steps; tokens on average: prompt {prompt}, "
        f"chosen {chosen}, rejected {rejected}; matrix product {rate / 1e9:.0f} GFLOP/s\n"
    )
    print(
        "| contender | s per step | pairs/s, ours to theirs | peak GB | peak, ours to theirs | arithmetic |"
    )
    print("|---|---|---|---|---|---|")
    for name in results:
        if name not in ran:
            print(f"| {name} | did not end | | | | |")
            continue
        print(
            f"| {name} | {seconds[name] / arguments.steps:.2f} | {seconds[name] / seconds[OURS]:.2f}x "
            f"| {peaks[name]:.2f} | {peaks[OURS] / peaks[name]:.2f}x "
            f"| {facts['flops'] / seconds[name] / rate:.2f} |"
        )
    away = max(
        abs(a - b)
        for name, runs in ran.items()
        if "sorted" not in name
        for a, b in zip(runs[0]["losses"], ran[OURS][0]["losses"], strict=True)
    )
    print(f"\nlosses of the steps differ by {away:.1e} at most\n")
    fastest = min(set(ran) - {OURS}, key=lambda name: seconds[name])
    print(f"fastest of TRL: {fastest}\n\n| to hold | | measured | |\n|---|---|---|---|")
    for name, (speed, memory) in ((AS_IT_SHIPS, HOLD_AS_IT_SHIPS), (fastest, HOLD_FASTEST)):
        if name in ran:
            _print_row(f"pairs/s, against {name}", seconds[name] / seconds[OURS], speed, least=True)
            _print_row(f"peak memory, against {name}", peaks[OURS] / peaks[name], memory, least=False)
    arithmetic = facts["flops"] / seconds[OURS] / rate
    _print_row("arithmetic", arithmetic, HOLD_ARITHMETIC, least=True)


def _print_row(what: str, measured: float, bound: float, *, least: bool) -> None:
    holds = measured >= bound if least else measured <= bound
    sign = ">=" if least else "<="
    print(f"| {what} | {sign} {bound:.2f}x | {measured:.2f}x | {'ok' if holds else 'short'} |")


if __name__ == "__main__":
    main()
