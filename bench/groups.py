"""Training on ranked data, where completions of a prompt make many pairs: this code, older code and TRL.

    python bench/groups.py --model MODEL --pairs PAIRS.jsonl --against CHECKOUT [--trl-python PYTHON]

Every prompt has about 140 tokens and four completions of about 65, cut from the texts of ``--pairs``. All six
pairs of a prompt are trained on, in steps of ``--pairs-per-step`` pairs, from the same weights with AdamW,
in fp32 on the CPU. Each contender is a process of its own, and contenders take turns. CHECKOUT is an older
copy of this repository, which takes the pairs in its own order, and TRL takes them in ours.

Start-up, the first step and scoring are not counted. Memory is the highest resident size of the process.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trl_side
from measure import run
from sides import SEED, Trained, command_line, do_job, run_job, train_ours

PROMPT, COMPLETION, COMPLETIONS = 140, 65, 4
OURS, OLDER = "dpo-opt", "dpo-opt, the other checkout"
MICRO_BATCHES = (1, 4, 8)


def main() -> None:
    """Run every contender in turn and print the table."""
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=int, default=2, help="counted steps, after one that is not")
    parser.add_argument("--against", type=Path, required=True, help="a checkout of other code")
    parser.set_defaults(pairs_per_step=24)
    arguments = parser.parse_args()
    if do_job(arguments, {"prepare": _prepare, "ours": _ours, "trl": _trl}):
        return
    results: dict[str, list[dict[str, Any]]] = {OURS: [], OLDER: []}
    results |= {f"TRL, micro-batch {size}": [] for size in MICRO_BATCHES}
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = Path(folder)
        tokens = run_job(arguments, "prepare")[0]["tokens"]
        run_job(arguments, "trl", micro_batch=1)  # scores its reference
        for _ in range(arguments.rounds):
            for name, found in results.items():
                found.append(_contend(arguments, name))
                print(f"{name}: {found[-1]}", file=sys.stderr, flush=True)
    seconds = {name: min(one["seconds"] for one in found) for name, found in results.items()}
    peaks = {name: max(one["peak_gb"] for one in found) for name, found in results.items()}
    print(f"\n{arguments.pairs_per_step} pairs a step; tokens on average: {tokens}\n")
    print("| contender | s per step | pairs/s, ours to theirs | peak GB | peak, ours to theirs |")
    print("|---|---|---|---|---|")
    for name in results:
        print(
            f"| {name} | {seconds[name] / arguments.steps:.2f} | {seconds[name] / seconds[OURS]:.2f}x "
            f"| {peaks[name]:.2f} | {peaks[OURS] / peaks[name]:.2f}x |"
        )


def _contend(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    if name == OLDER:
        return _older(arguments)
    if name == OURS:
        found, measured = run_job(arguments, "ours")
    else:
        found, measured = run_job(arguments, "trl", micro_batch=int(name.split()[-1]))
    return {**found, "peak_gb": round(measured.gigabytes, 2)}


def _older(arguments: argparse.Namespace) -> dict[str, Any]:
    """The other checkout's own training bench, on the same shards."""
    command = [sys.executable, str(arguments.against / "bench" / "train.py"), "--contender", '["ours", {}]']
    for option in ("model", "pairs", "folder", "steps", "pairs_per_step"):
        command += ["--" + option.replace("_", "-"), str(getattr(arguments, option))]
    threads = os.environ.get("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    own = {"PYTHONPATH": str(arguments.against), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": threads}
    measured = run(command, environment={**os.environ, **own})
    return {**json.loads(measured.output.splitlines()[-1]), "peak_gb": round(measured.gigabytes, 2)}


def _prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the pairs, score the reference, and fix the order."""
    from tokenizers import Tokenizer

    from dpo_opt.optimize.stream import PairStream
    from dpo_opt.optimize.transformers_scorer import HfScorer
    from dpo_opt.precompute import PrecomputeConfig, precompute
    from dpo_opt.schemas.shard_folder import ShardFolder

    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    words = _words(arguments.pairs)
    rows = []
    per_prompt = list(itertools.combinations(range(COMPLETIONS), 2))
    prompts, rest = divmod(arguments.pairs_per_step * (arguments.steps + 1), len(per_prompt))
    if rest:
        raise SystemExit(f"--pairs-per-step must be a multiple of {len(per_prompt)}")
    for number in range(prompts):
        prompt = f"{number}: {_cut(words, tokenizer, PROMPT)}"
        answers = [" " + _cut(words, tokenizer, COMPLETION) for _ in range(COMPLETIONS)]
        rows += [{"prompt": prompt, "chosen": answers[a], "rejected": answers[b]} for a, b in per_prompt]
    data, shards = arguments.folder / "pairs.jsonl", arguments.folder / "shards"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    precompute(
        PrecomputeConfig(model=str(arguments.model), data=data, shards=shards, dtype="float32"),
        scorer=HfScorer(arguments.model, dtype="float32"),
    )
    stream = PairStream(ShardFolder.open(shards), eval_split=0, by_prompt=True)
    pairs = stream.fetch(stream.epoch(seed=SEED, epoch=0))
    (arguments.folder / "order.json").write_text(json.dumps([pair.row for pair in pairs]))
    columns = zip(*((pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in pairs), strict=True)
    return {"tokens": [round(sum(map(len, column)) / len(pairs)) for column in columns]}


def _words(pairs: Path) -> Iterator[str]:
    """The words of the pairs' texts, without end."""
    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    texts = [row[key] for row in rows for key in ("chosen", "rejected", "prompt")]
    return itertools.cycle(word for text in texts for word in text.split())


def _cut(words: Iterator[str], tokenizer: Any, tokens: int) -> str:
    """The next words, of about so many tokens."""
    text = next(words)
    while len(tokenizer.encode(text).ids) < tokens:
        text += " " + next(words)
    return text


def _ours(arguments: argparse.Namespace) -> dict[str, Any]:
    return _counted(train_ours(arguments, sample_by="prompt"))


def _trl(arguments: argparse.Namespace, *, micro_batch: int) -> dict[str, Any]:
    found = trl_side.train(
        arguments.model, arguments.folder / "pairs.jsonl", arguments.folder / "trl",
        order=json.loads((arguments.folder / "order.json").read_text()),
        pairs_per_step=arguments.pairs_per_step, micro_batch=micro_batch, checkpointing=False,
        precompute=True, precompute_batch=1,
    )  # fmt: skip
    return _counted(found)


def _counted(trained: Trained) -> dict[str, Any]:
    """All steps but the first."""
    return {"seconds": trained.ends[-1] - trained.ends[0], "losses": trained.losses}


if __name__ == "__main__":
    main()
