"""A grid of 3 losses x 2 betas x 2 seeds: one cache and one command, against TRL's runs, side by side.

    python bench/sweep.py --model MODEL --pairs PAIRS.jsonl [--count 128] [--trl-python TRL_ENV/bin/python]

Both sides train one epoch of the same pairs in fp32 on the CPU, as many pairs a step, one run at a time.
dpo-opt scores the pairs with ``precompute`` and trains the grid with ``sweep``; its runs are processes of
their own. TRL 1.16 runs once for each combination, with ``precompute_ref_log_probs``, at the micro-batch that
is its fastest; all runs have one cache of ``datasets``, where TRL looks for log-probs that it has scored
already. How often it scored them is counted. Seconds are of whole commands, imports and loading included.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import trl_side
import yaml
from sides import command_line, do_job, run_job, write_pairs

GRID: dict[str, list[Any]] = {
    "loss_type": ["sigmoid", "ipo", "apo_zero"],
    "beta": [0.1, 0.5],
    "seed": [1, 2],
}
RATE = 1e-5


def main() -> None:
    """Run both sides once and print the table."""
    parser = command_line(__doc__)
    parser.add_argument("--count", type=int, default=128, help="pairs of the epoch")
    arguments = parser.parse_args()
    if do_job(arguments, {"trl": _trl}):
        return
    runs = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = Path(folder)
        write_pairs(arguments.pairs, arguments.folder / "pairs.jsonl", arguments.count)
        scoring, sweeping = _ours(arguments)
        theirs = [run_job(arguments, "trl", run=run) for run in runs]
    scored = sum(1 for found, _ in theirs if found["scored"])
    seconds = sum(measured.seconds for _, measured in theirs)
    print(f"\n{len(runs)} runs, {arguments.count} pairs, {arguments.pairs_per_step} a step\n")
    print("| | reference scored | seconds | theirs to ours |\n|---|---|---|---|")
    print(f"| dpo-opt: precompute, sweep | once | {scoring:.0f} + {sweeping:.0f} | |")
    ratio = seconds / (scoring + sweeping)
    print(f"| TRL: {len(runs)} runs | {scored} times | {seconds:.0f} | {ratio:.2f}x |")
    preparing = sum(found["preparing"] for found, _ in theirs)
    print(f"\nof TRL's seconds, {preparing:.0f} tokenize and score")


def _ours(arguments: argparse.Namespace) -> tuple[float, float]:
    """Seconds of precompute, and of the sweep."""
    folder = arguments.folder
    grid = folder / "grid.yaml"
    settings = {
        "batch_size": arguments.pairs_per_step,
        "learning_rate": RATE,
        "dtype": "float32",
        "logging_steps": 1,
    }
    grid.write_text(yaml.safe_dump({**settings, "grid": GRID}))
    model = ["--model", arguments.model, "--shards", folder / "shards"]
    return (
        _seconds(
            "precompute", *model, "--data", folder / "pairs.jsonl", "--backend", "hf", "--dtype", "float32"
        ),
        _seconds("sweep", *model, "--config", grid, "--output-dir", folder / "sweep"),
    )


def _seconds(*arguments: object) -> float:
    began = time.perf_counter()
    command = [sys.executable, "-m", "dpo_opt", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def _trl(arguments: argparse.Namespace, *, run: dict[str, Any]) -> dict[str, float]:
    found = trl_side.train(
        arguments.model, arguments.folder / "pairs.jsonl", arguments.folder / "trl" / str(time.time_ns()),
        order=None, pairs_per_step=arguments.pairs_per_step, micro_batch=1, checkpointing=False,
        precompute=True, settings={**run, "learning_rate": RATE},
    )  # fmt: skip
    return {"scored": found.scored, "preparing": found.preparing}


if __name__ == "__main__":
    main()
