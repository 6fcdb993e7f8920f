"""Writes the openings of stories: ``python prompts.py FOLDER`` makes prompts.jsonl and held_out.jsonl there.

No name and no sentence is in both, so that the reward is measured on openings of another kind.
"""

import json
import sys
from itertools import product
from pathlib import Path

_TRAIN = (
    ("Tom", "Lily", "Ben", "Mia", "Sam", "Anna", "Max", "Lucy", "Tim", "Sara", "Jack", "Emma"),
    (
        "Once upon a time, {} went to the", "{} was a very", "One day, {} found a", "{} did not want to",
        "The big dog saw {} and", "In the park, {} was", "Mom told {} that", "At night, {} had a",
    ),
)  # fmt: skip
_HELD_OUT = (
    ("Leo", "Amy", "Bob", "Zoe", "Joe", "Kate"),
    (
        "There was a child called {} who", "{} looked at the sky and", "The old cat ran to {} and",
        "It was cold, and {} felt", "Dad gave {} a", "When {} woke up,",
    ),
)  # fmt: skip


def write(path: Path, names: tuple[str, ...], openings: tuple[str, ...]) -> None:
    """Write a row for each opening of each name."""
    rows = [{"prompt": opening.format(name)} for opening, name in product(openings, names)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "prompts.jsonl", *_TRAIN)
    write(folder / "held_out.jsonl", *_HELD_OUT)
