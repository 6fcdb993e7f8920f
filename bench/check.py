"""How fast a dataset is audited, and how near that is to the tokenizer library itself.

    python bench/check.py --like PAIRS.jsonl.gz --model MODEL

Writes ``--rows`` pairs of about 2 KB, made of the texts of ``--like`` and all different, and measures
`dpo-opt check` on all of them (seconds and peak memory of its processes together), then, on the first
``--tokenized`` of them and in turns, `dpo-opt check --model` against the tokenizers library alone: the same
texts, read beforehand, in batches of a thousand, on as many threads as there are cores.

With ``--against CHECKOUT`` it measures the code there against this one instead, twice and in turns: CPU
seconds of `dpo-opt check` in one process, for the pairs and for ``--chats`` conversations of their texts.
"""

import argparse
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import Measured, run

_BYTES_PER_ROW = 2000
_BATCH = 1000


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--like", type=Path, required=True, help="any preference data with text rows")
    parser.add_argument("--model", type=Path, required=True, help="folder with a tokenizer")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tokenized", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, help="a checkout of other code")
    parser.add_argument("--chats", type=int, default=200_000)
    arguments = parser.parse_args()
    if arguments.against:
        _side_by_side(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        whole, part = Path(folder) / "whole.jsonl", Path(folder) / "part.jsonl"
        with whole.open("w") as file, part.open("w") as first:
            for i, row in enumerate(_rows(arguments.like, arguments.rows)):
                line = json.dumps(row) + "\n"
                file.write(line)
                if i < arguments.tokenized:
                    first.write(line)
        found = _check(whole)
        size = whole.stat().st_size / 1e9
        print(f"| check, {arguments.rows:,} pairs, {size:.2f} GB | {found.seconds:.1f} s |")
        print(f"| peak memory of its processes | {found.gigabytes:.2f} GB |")
        ours, library = [], []
        for _ in range(arguments.rounds):
            ours.append(_check(part, "--model", str(arguments.model)).seconds)
            library.append(_library(part, arguments.model))
            print(f"check --model {ours[-1]:.1f} s, library {library[-1]:.1f} s", file=sys.stderr, flush=True)
    print(f"| check --model, {arguments.tokenized:,} pairs | {statistics.median(ours):.1f} s |")
    print(f"| tokenizers library alone, the same texts | {statistics.median(library):.1f} s |")
    ratios = [theirs / mine for mine, theirs in zip(ours, library, strict=True)]
    print(f"| speed relative to the library | {statistics.median(ratios):.2f} |")


def _side_by_side(arguments: argparse.Namespace) -> None:
    ours = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        texts, chats = Path(folder) / "texts.jsonl", Path(folder) / "chats.jsonl"
        with texts.open("w") as file, chats.open("w") as other:
            for i, row in enumerate(_rows(arguments.like, arguments.rows)):
                file.write(json.dumps(row) + "\n")
                if i < arguments.chats:
                    other.write(json.dumps(_chat(row, turns=i % 3)) + "\n")
        for data in (texts, chats):
            for root in (arguments.against, ours, arguments.against, ours):
                print(f"| {data.stem} | {root.name} | {_cpu_seconds(root, data):.1f} s |", flush=True)


def _chat(row: dict[str, Any], *, turns: int) -> dict[str, Any]:
    """A conversation with some earlier turns, and every other one with a system message."""
    texts = [("system", "You are kind.")] if turns % 2 else []
    texts += [("user", row["prompt"][:200]), ("assistant", row["chosen"][:200])] * turns
    texts.append(("user", row["prompt"]))
    prompt = [{"role": role, "content": text} for role, text in texts]
    sides = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    return {**row, "prompt": prompt, **sides}


def _cpu_seconds(root: Path, data: Path) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-P", "-m", "dpo_opt", "check", str(data), "--json", "--processes", "1"]
    run(command, environment={**os.environ, "PYTHONPATH": str(root)})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _rows(like: Path, count: int) -> Iterator[dict[str, Any]]:
    from dpo_opt.precompute.config import DataConfig
    from dpo_opt.precompute.read.datasets import read_pairs

    pairs = list(read_pairs(DataConfig(data=[str(like)])))
    mean = statistics.fmean(len(f"{p.prompt}{p.chosen}{p.rejected}") for p in pairs)
    together = max(1, round(_BYTES_PER_ROW / mean))
    rng = random.Random(0)
    for i in range(count):
        some = rng.sample(pairs, together)
        prompt, chosen, rejected = (
            "\n".join(map(str, texts)) for texts in zip(*(p[1:4] for p in some), strict=True)
        )
        yield {"prompt": f"{i}. {prompt}", "chosen": chosen, "rejected": rejected, "source": some[0].source}


def _check(data: Path, *options: str) -> Measured:
    return run([sys.executable, "-m", "dpo_opt", "check", str(data), "--json", *options])


def _library(data: Path, model: Path) -> float:
    """Seconds that the library alone takes for prompt, prompt + chosen, prompt + rejected of every row."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    rows = (json.loads(line) for line in data.open())
    texts = [t for r in rows for t in (r["prompt"], r["prompt"] + r["chosen"], r["prompt"] + r["rejected"])]
    began = time.perf_counter()
    for i in range(0, len(texts), _BATCH):
        [encoding.ids for encoding in tokenizer.encode_batch(texts[i : i + _BATCH])]
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
