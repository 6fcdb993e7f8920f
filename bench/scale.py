"""What planning, status, finalize and the start of training take at a million pairs, and in which memory.

    python bench/scale.py --model MODEL

Pairs are made up, short and all different. Planning reads them as any data; the shards are then filled by the
real worker with a scorer that answers at once, because what is measured is not the model. The second table is
training on these shards and on few, as many steps; "start" is all that comes before the first step, without
imports and the model's weights. The third is the real worker with the real model on transformers, at two
sizes. Any small model serves.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from measure import Measured, run

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.run import work
from dpo_opt.precompute.shards.reference import make_tokenizer, resolve_reference
from dpo_opt.precompute.shards.write_plan import settle_plan
from dpo_opt.schemas.fingerprint import MODEL_FIELDS
from dpo_opt.schemas.pairs import LogpArray, Numerics, TokenSequence
from dpo_opt.schemas.shard_folder import ShardFolder

WORDS = ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school"]


class AtOnce:
    """A scorer that costs nothing."""

    numerics = Numerics(engine="none", engine_version="1", strategy="constant", dtype="float32")

    def token_logps(self, sequences: Sequence[TokenSequence]) -> list[LogpArray]:
        """See ``Scorer``."""
        return [np.full(len(s.completion_ids), -1, dtype=np.float32) for s in sequences]


def main() -> None:
    """Measure and print three tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a small model")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--train-rows", type=int, default=10_000, help="the smaller of the two training sets")
    parser.add_argument("--worker-rows", type=int, nargs=2, default=[1_000, 100_000])
    parser.add_argument("--part", choices=["plan", "fill", "start"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        _do(arguments.part, arguments.model, arguments.folder)
        return
    command = [sys.executable, "-m", "dpo_opt"]
    with tempfile.TemporaryDirectory() as large, tempfile.TemporaryDirectory() as small:
        again = [sys.executable, __file__, "--model", str(arguments.model), "--folder"]
        shards = ["--shards", f"{large}/shards", "--json"]
        _write_pairs(Path(large) / "pairs.jsonl", arguments.rows)
        print(f"| {arguments.rows:,} pairs | seconds | GB |\n|---|---|---|")
        _print("plan", run([*again, large, "--part", "plan"]))
        _print("(fill)", run([*again, large, "--part", "fill"]))
        _print("status", run([*command, "status", *shards]))
        _print("finalize", run([*command, "finalize", *shards]))
        _print("status, finalized", run([*command, "status", *shards]))
        _print("finalize, again", run([*command, "finalize", *shards]))
        _print("verify", run([*command, "verify", *shards]))

        _write_pairs(Path(small) / "pairs.jsonl", arguments.train_rows)
        run([*again, small, "--part", "plan"])
        run([*again, small, "--part", "fill"])
        run([*command, "finalize", "--shards", f"{small}/shards", "--json"])
        print("\n| train | start, seconds | 20 steps, seconds | GB |\n|---|---|---|---|")
        for rows, folder in ((arguments.train_rows, small), (arguments.rows, large)):
            start = float(run([*again, folder, "--part", "start"]).output)
            train = ["train", "--shards", f"{folder}/shards", "--model", str(arguments.model), "--json"]
            train += ["--output-dir", f"{folder}/run", "--max-steps", "20", "--reference-differs"]
            measured = run([*command, *train, "--dtype", "float32", "--eval-split", "0.0001"])
            print(f"| {rows:,} pairs | {start:.2f} | {measured.seconds:.1f} | {measured.gigabytes:.2f} |")
    print("\n| worker | seconds | GB |\n|---|---|---|")
    for rows in arguments.worker_rows:
        with tempfile.TemporaryDirectory() as name:
            data = Path(name) / "pairs.jsonl"
            _write_pairs(data, rows)
            worker = [*command, "precompute", "--model", str(arguments.model), "--data", str(data)]
            worker += ["--backend", "hf", "--dtype", "float32", "--shards", f"{name}/shards", "--json"]
            _print(f"{rows:,} pairs", run(worker))


def _do(part: str, model: Path, folder: Path) -> None:
    """One part of the work, in a process of its own."""
    if part == "start":
        print(_start_seconds(model, folder / "shards"))
        return
    config = _config(model, folder)
    reference = resolve_reference(config)
    if part == "plan":
        tokenizer = make_tokenizer(config, reference)
        settle_plan(config, reference=reference, tokenizer=tokenizer, numerics=AtOnce.numerics)
    else:
        work(config.model_copy(update={"worker_index": 0}), scorer=AtOnce())


def _start_seconds(model: Path, shards: Path) -> float:
    """Folder, identity, split, the sample for parity, the first step's pairs."""
    from dpo_opt.optimize.identity import require_same_model
    from dpo_opt.optimize.parity_sample import pairs_beside
    from dpo_opt.optimize.stream import PairStream

    began = time.perf_counter()
    folder = ShardFolder.open(shards)
    require_same_model(folder, model, fields=MODEL_FIELDS, fix="")
    with folder.tokenizer():
        pass
    stream = PairStream(folder, eval_split=0.0001)
    pairs_beside(folder, next(stream.steps(seed=0, size=64)))
    return time.perf_counter() - began


def _config(model: Path, folder: Path) -> PrecomputeConfig:
    return PrecomputeConfig(model=str(model), data=[str(folder / "pairs.jsonl")], shards=folder / "shards")


def _write_pairs(path: Path, rows: int) -> None:
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            prompt, chosen, rejected = (" ".join(rng.choices(WORDS, k=k)) for k in (12, 8, 8))
            row = {"prompt": f"{i} {prompt}", "chosen": f" {chosen}", "rejected": f" {rejected} no"}
            file.write(json.dumps(row) + "\n")


def _print(what: str, measured: Measured) -> None:
    print(f"| {what} | {measured.seconds:.1f} | {measured.gigabytes:.2f} |", flush=True)


if __name__ == "__main__":
    main()
