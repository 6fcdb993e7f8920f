"""Pairs of real texts for ``planted_causes.py``: three tasks, and what is planted in their labels.

``--data`` is a folder with ``pairs/human_pairs.jsonl.gz`` (prompt, chosen, rejected as people labelled them)
and ``text/sentence_polarity.zip`` (sentences of film reviews that people labelled, nltk's corpus).
"""

import gzip
import json
import random
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

Pair = dict[str, Any]

_PROMPT_END = 80  # characters; the model's context is short
_COMPLETION = range(30, 170)


def human(data: Path, count: int, seed: int) -> list[Pair]:
    """Pairs as people labelled them: a weak signal for a small model."""
    return random.Random(seed).sample(_human_pairs(data), count)


def answers(data: Path, count: int, seed: int) -> list[Pair]:
    """An answer that a person preferred, against a sentence of a film review: a clear signal."""
    sentences = random.Random(seed).sample(_sentences(data, "pos") + _sentences(data, "neg"), count)
    pairs = human(data, count, seed)
    return [pair | {"rejected": sentence} for pair, sentence in zip(pairs, sentences, strict=True)]


def tone(data: Path, count: int, seed: int) -> list[Pair]:
    """A kind sentence of a film review against an unkind one: a signal between the two."""
    chance = random.Random(seed)
    kind, unkind = (chance.sample(_sentences(data, name), count) for name in ("pos", "neg"))
    pairs = zip(human(data, count, seed), kind, unkind, strict=True)
    return [pair | {"chosen": chosen, "rejected": rejected} for pair, chosen, rejected in pairs]


def a_tenth_swapped(data: Path, count: int, seed: int) -> list[Pair]:
    """``answers`` with the labels of every tenth pair swapped."""
    return [swapped(pair) if i % 10 == 0 else pair for i, pair in enumerate(answers(data, count, seed))]


def one_source_swapped(data: Path, count: int, seed: int) -> list[Pair]:
    """``answers`` of three sources, one of which has all its labels swapped."""
    named = [pair | {"source": f"annotator {i % 3}"} for i, pair in enumerate(answers(data, count, seed))]
    return [swapped(pair) if pair["source"] == "annotator 2" else pair for pair in named]


def longer_chosen(data: Path, count: int, seed: int) -> list[Pair]:
    """``human`` with the longer completion chosen, but for every tenth pair."""
    pairs = human(data, count, seed)
    return [
        swapped(pair) if (len(pair["chosen"]) < len(pair["rejected"])) != (i % 10 == 0) else pair
        for i, pair in enumerate(pairs)
    ]


def one_word_differs(data: Path, count: int, seed: int) -> list[Pair]:
    """A preferred answer, against the same with one of its later words replaced by another answer's."""
    chance = random.Random(seed)
    pairs = human(data, count, seed)
    words = sorted({word for pair in pairs for word in pair["chosen"].split() if len(word) > 3})
    for pair in pairs:
        changed = pair["chosen"].split(" ")
        at = chance.randrange(len(changed) // 2, len(changed))
        changed[at] = chance.choice([word for word in words if word != changed[at]])
        pair["rejected"] = " ".join(changed)
    return pairs


def swapped(pair: Pair) -> Pair:
    """The pair with its label swapped."""
    return pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]}


def _human_pairs(data: Path) -> list[Pair]:
    with gzip.open(data / "pairs" / "human_pairs.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    short = (r for r in rows if len(r["chosen"]) in _COMPLETION and len(r["rejected"]) in _COMPLETION)
    # One pair of each prompt, so that sources and copies share none.
    ends = {r["prompt"][-_PROMPT_END:]: r for r in short if r["chosen"] != r["rejected"]}
    return [{"prompt": end, "chosen": r["chosen"], "rejected": r["rejected"]} for end, r in ends.items()]


@cache
def _sentences(data: Path, label: str) -> list[str]:
    with zipfile.ZipFile(data / "text" / "sentence_polarity.zip") as corpus:
        text = corpus.read(f"sentence_polarity/rt-polarity.{label}").decode("latin-1")
    return [f" {line.strip()}" for line in text.splitlines() if len(line) in _COMPLETION]
