"""How long training stands still for a checkpoint: `python bench/saves.py --model MODEL --pairs PAIRS`.

PAIRS: JSON Lines with prompt, chosen and rejected. Every step but the first two is followed by a save.
Counted is the time between two steps, and the time that an update waits before it may change the weights.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_opt.optimize import TrainConfig, loop, train
from dpo_opt.optimize.checkpoint.background import BackgroundSaves
from dpo_opt.optimize.transformers_scorer import HfScorer
from dpo_opt.precompute import PrecomputeConfig, precompute

WARM_UP = 2


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - began)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--pairs-per-step", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="saves-") as name:
        folder = Path(name)
        lines = options.pairs.read_text(encoding="utf-8").splitlines()[: 2 * options.pairs_per_step]
        (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        scored = PrecomputeConfig(
            model=str(options.model), data=folder / "pairs.jsonl", shards=folder / "shards", dtype="float32"
        )
        precompute(scored, scorer=HfScorer(options.model, dtype="float32"))
        config = TrainConfig(
            model=str(options.model),
            shards=scored.shards,
            output_dir=folder / "run",
            batch_size=options.pairs_per_step,
            num_train_epochs=100,
            # The save at the end is waited for.
            max_steps=WARM_UP + options.saves + 1,
            save_steps=1,
        )
        print(json.dumps(stops(config, options.saves)), flush=True)


def stops(config: TrainConfig, saves: int) -> dict[str, object]:
    """Seconds that training stood still for each save, and that each step took besides."""
    between: list[float] = []
    waits: list[float] = []
    steps: list[float] = []
    loop.evaluate_and_save = timed(loop.evaluate_and_save, between)
    loop.train_step = timed(loop.train_step, steps)
    BackgroundSaves.wait_for_copy = timed(BackgroundSaves.wait_for_copy, waits)
    train(config)
    # The call number n comes before step n; a save before step n is waited for in that step.
    counted = [between[n] + waits[n] for n in range(WARM_UP, WARM_UP + saves)]
    return {
        "stood still, seconds per save": [round(seconds, 3) for seconds in counted],
        "median": round(statistics.median(counted), 3),
        "steps, seconds": [round(step - wait, 1) for step, wait in zip(steps, waits, strict=True)],
    }


if __name__ == "__main__":
    main()
