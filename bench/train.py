"""Training speed and peak memory against TRL, side by side in one run: the ratios of BENCHMARKS.md.

    python bench/train.py --model MODEL --pairs PAIRS.jsonl --trl-python TRL_ENV/bin/python

Both sides train the same pairs from the same weights in fp32 with AdamW, G pairs per step, references
precomputed beforehand and not counted. TRL runs with its own settings (micro-batch 8, gradient
checkpointing) and with the fastest ones known. Each contender is a process of its own, start-up is not
counted, contenders alternate, and memory is the process's peak resident size.

TRL is a peer, not a dependency: it lives in an environment of its own (`pip install trl datasets`).
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

G = 8
SETTINGS = {
    "TRL as it ships (micro-batch 8, gradient checkpointing)": {"micro_batch": 8, "checkpointing": True},
    "TRL at its fastest (micro-batch 1)": {"micro_batch": 1, "checkpointing": False},
}


def main() -> None:
    """Run every contender in turn and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True, help="JSONL with prompt, chosen, rejected")
    parser.add_argument("--trl-python", required=True, help="Python of the environment that has TRL")
    parser.add_argument("--steps", type=int, default=3, help="counted steps, after one that is not")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender == "ours":
        _report(*_ours(arguments))
        return
    if arguments.contender:
        _report(*_trl(arguments, **json.loads(arguments.contender)))
        return
    contenders = {"dpo-opt": (sys.executable, "ours")}
    contenders |= {name: (arguments.trl_python, json.dumps(setting)) for name, setting in SETTINGS.items()}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds):
        for name, (python, contender) in contenders.items():
            command = [python, __file__, "--model", str(arguments.model), "--pairs", str(arguments.pairs)]
            command += ["--trl-python", "-", "--steps", str(arguments.steps), "--contender", contender]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[name].append(json.loads(out.splitlines()[-1]))
            print(name, results[name][-1], file=sys.stderr, flush=True)
    _print_table(results)


def _report(seconds: list[float], losses: list[float]) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"seconds": seconds, "losses": losses, "peak_gb": round(peak, 2)}))


def _ours(arguments: argparse.Namespace) -> tuple[list[float], list[float]]:
    from dpo_opt.optimize import TrainConfig, train
    from dpo_opt.optimize.score import HfScorer
    from dpo_opt.precompute import PrecomputeConfig, precompute

    class Clock:
        """Seconds of each step, without the first."""

        def __init__(self) -> None:
            self.marks: list[float] = []

        def start(self, what: str, *, total: int, unit: str) -> None:
            pass

        def advance(self, count: int, note: str = "") -> None:
            self.marks.append(time.perf_counter())

        def finish(self) -> None:
            pass

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        shards, run = Path(folder) / "shards", Path(folder) / "run"
        config = PrecomputeConfig(
            model=str(arguments.model), data=arguments.pairs, shards=shards, dtype="float32"
        )
        precompute(config, scorer=HfScorer(arguments.model, dtype="float32"))
        train(
            TrainConfig(
                shards=shards, model=str(arguments.model), output_dir=run, batch_size=G, dtype="float32",
                max_steps=arguments.steps + 1, logging_steps=1, save_dtype="bfloat16",
            ),
            progress=clock,
        )  # fmt: skip
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return _differences(clock.marks), [json.loads(line)["loss"] for line in lines]


def _trl(arguments: argparse.Namespace, *, micro_batch: int, checkpointing: bool) -> Any:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    lines = arguments.pairs.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines][: G * (arguments.steps + 1)]
    keys = ("prompt", "chosen", "rejected")
    data = Dataset.from_list([{key: row[key] for key in keys} for row in rows])
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.marks: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.marks.append(time.perf_counter())

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder, per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=G // micro_batch, max_steps=arguments.steps + 1, logging_steps=1,
            save_strategy="no", report_to=[], use_cpu=True, bf16=False, seed=0, learning_rate=1e-6,
            gradient_checkpointing=checkpointing, precompute_ref_log_probs=True, disable_tqdm=True,
            # One row at a time, so that scoring the reference does not set the peak.
            precompute_ref_batch_size=1,
        )  # fmt: skip
        trainer = DPOTrainer(
            model=model, args=config, train_dataset=data, callbacks=[clock],
            processing_class=AutoTokenizer.from_pretrained(arguments.model),
        )  # fmt: skip
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return _differences(clock.marks), losses


def _differences(marks: list[float]) -> list[float]:
    return [round(b - a, 3) for a, b in itertools.pairwise(marks)]


def _print_table(results: dict[str, list[dict[str, Any]]]) -> None:
    medians = {
        name: statistics.median(s for run in runs for s in run["seconds"]) for name, runs in results.items()
    }
    peaks = {name: max(run["peak_gb"] for run in runs) for name, runs in results.items()}
    ours = "dpo-opt"
    print("| contender | s per step (median) | pairs/s, ours to theirs | peak GB | peak, ours to theirs |")
    print("|---|---|---|---|---|")
    for name in results:
        print(
            f"| {name} | {medians[name]:.1f} | {medians[name] / medians[ours]:.2f}x | {peaks[name]:.1f} "
            f"| {peaks[ours] / peaks[name]:.2f}x |"
        )


if __name__ == "__main__":
    main()
