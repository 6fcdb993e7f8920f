"""What planning, status and finalize take at a million pairs, and that a worker's memory does not grow.

    python bench/scale.py --model MODEL

Pairs are made up, short and all different. Planning reads them as any data; the shards are then filled by the
real worker with a scorer that answers at once, because what is measured is not the model. The second table is
the real worker with the real model on transformers, at two sizes. Any small model serves.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from measure import Measured, run

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.reference import make_tokenizer, resolve_reference
from dpo_opt.precompute.run import work
from dpo_opt.precompute.settle import settle_plan
from dpo_opt.schemas.pairs import LogpArray, Numerics, TokenSequence

WORDS = ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school"]


class AtOnce:
    """A scorer that costs nothing."""

    numerics = Numerics(engine="none", engine_version="1", strategy="constant", dtype="float32")

    def token_logps(self, sequences: Sequence[TokenSequence]) -> list[LogpArray]:
        """See ``Scorer``."""
        return [np.full(len(s.completion_ids), -1, dtype=np.float32) for s in sequences]


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a small model")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--worker-rows", type=int, nargs=2, default=[1_000, 100_000])
    parser.add_argument("--part", choices=["plan", "fill"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        config = _config(arguments.model, arguments.folder)
        reference = resolve_reference(config)
        if arguments.part == "plan":
            tokenizer = make_tokenizer(config, reference)
            settle_plan(config, reference=reference, tokenizer=tokenizer, numerics=AtOnce.numerics)
        else:
            work(config.model_copy(update={"worker_index": 0}), scorer=AtOnce())
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_pairs(folder / "pairs.jsonl", arguments.rows)
        again = [sys.executable, __file__, "--model", str(arguments.model), "--folder", name, "--part"]
        command = [sys.executable, "-m", "dpo_opt"]
        shards = ["--shards", str(folder / "shards"), "--json"]
        print(f"| {arguments.rows:,} pairs | seconds | GB |\n|---|---|---|")
        _print("plan", run([*again, "plan"]))
        _print("(fill)", run([*again, "fill"]))
        _print("status", run([*command, "status", *shards]))
        _print("finalize", run([*command, "finalize", *shards]))
        _print("status, finalized", run([*command, "status", *shards]))
        _print("finalize, again", run([*command, "finalize", *shards]))
        _print("verify", run([*command, "verify", *shards]))
    print("\n| worker | seconds | GB |\n|---|---|---|")
    for rows in arguments.worker_rows:
        with tempfile.TemporaryDirectory() as name:
            data = Path(name) / "pairs.jsonl"
            _write_pairs(data, rows)
            worker = [*command, "precompute", "--model", str(arguments.model), "--data", str(data)]
            worker += ["--backend", "hf", "--dtype", "float32", "--shards", f"{name}/shards", "--json"]
            _print(f"{rows:,} pairs", run(worker))


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
