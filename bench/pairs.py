"""Pairs for the benches: different ones, short enough for every contender, in a fixed random order.

python bench/pairs.py --like human_pairs.jsonl.gz --source hh --model MODEL --count 128 > PAIRS.jsonl
"""

import argparse
import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Write the pairs, and how long they are to stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--like", type=Path, required=True, help="JSON lines with prompt, chosen, rejected")
    parser.add_argument("--model", type=Path, required=True, help="folder with the tokenizer")
    parser.add_argument("--source", default="", help="part of the name of the sources that are wanted")
    parser.add_argument("--longest", type=int, default=640, help="tokens of a prompt and a completion")
    parser.add_argument("--count", type=int, default=128)
    arguments = parser.parse_args()

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    prompts = completions = count = 0
    for row in _shuffled(arguments.like, arguments.source):
        prompt, *both = (
            tokenizer.encode(text).ids
            for text in (row["prompt"], row["prompt"] + row["chosen"], row["prompt"] + row["rejected"])
        )
        # Where a token reaches from a prompt into a completion, programs cut in different places.
        if any(ids[: len(prompt)] != prompt or len(ids) == len(prompt) for ids in both):
            continue
        if max(map(len, both)) >= arguments.longest:
            continue
        print(json.dumps({key: row[key] for key in ("prompt", "chosen", "rejected")}))
        count += 1
        prompts += len(prompt)
        completions += sum(map(len, both)) - 2 * len(prompt)
        if count == arguments.count:
            break
    else:
        raise SystemExit(f"only {count} pairs fit")
    print(
        f"{count} pairs; tokens on average: prompt {prompts / count:.0f}, "
        f"completion {completions / 2 / count:.0f}",
        file=sys.stderr,
    )


def _shuffled(path: Path, source: str) -> list[dict[str, Any]]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if source in row.get("source", "")]
    different = {(row["prompt"], row["chosen"], row["rejected"]): row for row in rows}
    rows = [row for row in different.values() if row["chosen"] != row["rejected"]]
    random.Random(1).shuffle(rows)
    return rows


if __name__ == "__main__":
    main()
