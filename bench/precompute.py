"""Scoring the reference: ours against TRL, side by side in one run, as pairs per second.

    python bench/precompute.py --model MODEL --pairs PAIRS.jsonl [--trl-python TRL_ENV/bin/python]

Every contender is a process of its own and scores the same tokenized pairs, none repeated, in one dtype;
loading, compiling and one warm-up pair are not counted, and contenders take turns. Three sets: the pairs as
they are, with prompts four times as long, and with completions four times as long.

On a GPU the same command runs there: vLLM then scores completion rows alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SETS = {"ordinary": (1, 1), "prompt-heavy": (4, 1), "completion-heavy": (1, 4)}
CONTENDERS: dict[str, dict[str, Any]] = {
    "vLLM, prompts computed once": {"ours": "vllm", "reuse": True},
    "vLLM, plain": {"ours": "vllm", "reuse": False},
    "transformers, packed": {"ours": "hf"},
    "TRL, batch 8 (default)": {"batch": 8},
    "TRL, batch 2": {"batch": 2},
    "TRL, batch 1": {"batch": 1},
}


def main() -> None:
    """Run every contender in turn on every set and print one table per set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument(
        "--pairs", type=Path, required=True, help="JSONL with prompt, chosen, rejected as text"
    )
    parser.add_argument("--trl-python", default=sys.executable, help="Python of an environment that has TRL")
    parser.add_argument("--count", type=int, default=24, help="pairs that are scored")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=list(SETS))
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        setting = json.loads(arguments.contender)
        seconds = _ours(arguments, **setting) if "ours" in setting else _trl(arguments, **setting)
        print(json.dumps({"seconds": seconds}))
        return
    for name in arguments.sets:
        results: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
        with tempfile.TemporaryDirectory() as folder:
            pairs = Path(folder) / "pairs.jsonl"
            _write_set(arguments.pairs, pairs, arguments.count + 1, *SETS[name])
            for _ in range(arguments.rounds):
                for contender, setting in CONTENDERS.items():
                    results[contender].append(_run(arguments, pairs, setting))
                    print(name, contender, results[contender][-1], file=sys.stderr, flush=True)
        _print_table(name, results, arguments.count)


def _write_set(source: Path, target: Path, count: int, prompts: int, completions: int) -> None:
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()][:count]
    with target.open("w", encoding="utf-8") as file:
        for row in rows:
            longer = {
                "prompt": row["prompt"] * prompts,
                "chosen": row["chosen"] * completions,
                "rejected": row["rejected"] * completions,
            }
            file.write(json.dumps(longer) + "\n")


def _run(arguments: argparse.Namespace, pairs: Path, setting: dict[str, Any]) -> float:
    python = sys.executable if "ours" in setting else arguments.trl_python
    command = [python, __file__, "--model", str(arguments.model), "--pairs", str(pairs)]
    command += ["--dtype", arguments.dtype, "--contender", json.dumps(setting)]
    # TRL keeps what it scored under HF_HOME, and would take it from there the next time.
    environment = {**os.environ, "HF_HOME": str(pairs.parent / f"cache-{time.monotonic_ns()}")}
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return float(json.loads(out.splitlines()[-1])["seconds"])


def _ours(arguments: argparse.Namespace, *, ours: str, reuse: bool = True) -> float:
    from dpo_opt.precompute.config import DataConfig
    from dpo_opt.precompute.engine.score_pairs import score_pairs
    from dpo_opt.precompute.engine.vllm_build import prepare_environment
    from dpo_opt.precompute.engine.vllm_model import VllmModel
    from dpo_opt.precompute.read.datasets import read_pairs
    from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer, model_vocab_size
    from dpo_opt.precompute.tokens.tokenize import PairTokenizer
    from dpo_opt.schemas.pairs import TokenizedPair

    prepare_environment()
    longest = 4096
    tokenizer = PairTokenizer(
        load_tokenizer(arguments.model),
        max_length=longest,
        truncation="keep_start",
        vocab_size=model_vocab_size(arguments.model),
    )
    found = [tokenizer(pair) for pair in read_pairs(DataConfig(data=[str(arguments.pairs)]))]
    pairs = [pair for pair in found if isinstance(pair, TokenizedPair)]
    if ours == "vllm":
        scorer: Any = VllmModel(arguments.model, dtype=arguments.dtype, max_length=longest, reuse=reuse)
    else:
        from dpo_opt.optimize.transformers_scorer import HfScorer

        scorer = HfScorer(arguments.model, dtype=arguments.dtype)
    score_pairs(pairs[-1:], scorer)
    began = time.perf_counter()
    score_pairs(pairs[:-1], scorer)
    return time.perf_counter() - began


def _trl(arguments: argparse.Namespace, *, batch: int) -> float:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = [json.loads(line) for line in arguments.pairs.read_text(encoding="utf-8").splitlines()][:-1]
    on_cpu = not torch.cuda.is_available()
    seconds: list[float] = []
    precompute = DPOTrainer._precompute_ref_logps

    def timed(self: Any, *args: Any) -> Any:
        began = time.perf_counter()
        result = precompute(self, *args)
        seconds.append(time.perf_counter() - began)
        return result

    DPOTrainer._precompute_ref_logps = timed
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder, precompute_ref_log_probs=True, precompute_ref_batch_size=batch,
            max_length=4096, use_cpu=on_cpu, bf16=arguments.dtype == "bfloat16" and not on_cpu,
            report_to=[], disable_tqdm=True, gradient_checkpointing=False,
        )  # fmt: skip
        DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(
                arguments.model, dtype=getattr(torch, arguments.dtype)
            ),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(arguments.model),
        )
    return sum(seconds)


def _print_table(name: str, results: dict[str, list[float]], count: int) -> None:
    medians = {contender: statistics.median(seconds) for contender, seconds in results.items()}
    best = min(medians.values())
    print(f"\n{name}\n\n| contender | pairs/s | the fastest is faster by |\n|---|---|---|")
    for contender, seconds in medians.items():
        print(f"| {contender} | {count / seconds:.2f} | {seconds / best:.2f}x |")


if __name__ == "__main__":
    main()
