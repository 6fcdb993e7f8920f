"""The prompts of training, validation and held-out measurement: no prompt is in two of them.

Openings of stories are made here. In another split they have other names and other sentences, so that the
reward is measured on openings of another kind. All prompts have the same number of tokens: then one length of
the sequences cuts every completion where sampling cut it, and no completion seems to end that did not.
"""

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from reviews import read_reviews, shuffled
from settings import Experiment

from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.models import find_model
from dpo_opt.schemas.storage import publish_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_STORIES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "train": (
        (
            "Tom", "Lily", "Ben", "Mia", "Sam", "Anna", "Max", "Lucy", "Tim", "Sara", "Jack", "Emma",
            "Sue", "Billy", "Daisy", "Fred", "Molly", "Peter", "Rose", "Spot", "Jane", "Timmy", "Ella",
            "Nick",
        ),
        (
            "{} was a very little child who", "{} did not want to go home and",
            "{} and the bird were in the tree",
            "{} heard a loud noise at the door", "{} lost a toy in the park and",
            "{} would play with the ball when",
            "Then {} went to the big house of", "Mom told {} that it was time to",
            "One day {} found a box that had",
            "The dog saw {} and ran up to the", "So {} had to stay with the man who",
            "At night {} had a dream of the",
            "A man asked {} to come with him", "Today {} was at the lake with the",
            "After that {} began to look at",
            "In the park {} was on the slide and", "The girl and {} went to get some of",
            "It was {} who had the red",
        ),
    ),
    "validation": (
        ("Mark", "Nina", "Paul", "Ruth", "Carl", "Jill", "Dan", "Eva", "Hugo", "Iris"),
        (
            "When it rained, {} was in the room", "{} made a card for the old man",
            "Grandma gave {} some of the soup",
            "A boat came, and {} got in to see", "{} sat on a chair, and the cat",
        ),
    ),
    "held_out": (
        ("Leo", "Amy", "Bob", "Zoe", "Joe", "Kate", "Finn", "Gus", "Ada", "Otto"),
        (
            "There was {} who did not have a", "{} looked at the sky and said that",
            "The old cat ran to {} and sat",
            "It was cold, {} felt that the", "Dad gave {} a book that was about",
            "{} woke up, and there was a",
        ),
    ),
}  # fmt: skip


def write_prompts(folder: Path, experiment: Experiment, *, corpus: Path | None) -> None:
    """Write ``SPLIT.jsonl`` of each split, and with reviews ``sft.jsonl``, unless they are there.

    Raises:
        DataError: There are fewer prompts than the settings ask for, or two splits share one.
    """
    if folder.is_dir():
        return
    assert experiment.model is not None
    tokenizer = load_tokenizer(find_model(experiment.model))
    wanted = {
        "held_out": experiment.held_out.prompts,
        "validation": experiment.validation.prompts,
        "train": experiment.train_prompts,
    }
    if experiment.reviews is None:
        texts = {split: _stories(split) for split in wanted}
    else:
        reviews = shuffled(read_reviews(corpus), experiment.reviews.classifier_share)[1]
        # One supply for all: a review that begins a prompt of one split is not there for the next.
        supply = iter([review.text for review in reviews])
        texts = dict.fromkeys(wanted, supply)
    found: dict[str, dict[str, str]] = {}
    seen: set[str] = set()
    for split, count in wanted.items():
        found[split] = _beginnings(texts[split], tokenizer, experiment.prompt_tokens, count, seen)
        if len(found[split]) < count:
            raise DataError(
                f"{split} has {len(found[split])} of the {count} prompts that the settings ask for",
                where=None if corpus is None else str(corpus),
                fix="ask for fewer prompts in the settings, or pass --reviews with more reviews",
            )
    require_disjoint(found)
    with publish_folder(folder) as private:
        for split, prompts in found.items():
            _write(private / f"{split}.jsonl", ({"prompt": prompt} for prompt in prompts))
        if experiment.reviews is not None:
            _write(private / "sft.jsonl", ({"text": text} for text in found["train"].values()))


def require_disjoint(splits: Mapping[str, Iterable[str]]) -> None:
    """Refuse splits of which two have a prompt in common, or one has a prompt twice.

    Raises:
        DataError: They do.
    """
    home: dict[str, str] = {}
    for split, prompts in splits.items():
        for prompt in prompts:
            if prompt in home:
                raise DataError(
                    f"the prompt {prompt!r} is in {home[prompt]} and again in {split}",
                    why="a policy may have learned what it is measured on",
                    fix="make the splits of different prompts, then begin a new --output",
                )
            home[prompt] = split


def read_prompts(file: Path) -> list[str]:
    """The prompts of a file that ``write_prompts`` wrote."""
    return [json.loads(line)["prompt"] for line in file.read_text(encoding="utf-8").splitlines()]


def _stories(split: str) -> Iterator[str]:
    """The openings of a split in an order that is always the same."""
    names, openings = _STORIES[split]
    mixed = [opening.format(name) for opening, name in product(openings, names)]
    random.Random(0).shuffle(mixed)
    return iter(mixed)


def _beginnings(
    texts: Iterator[str], tokenizer: "PreTrainedTokenizerFast", tokens: int, count: int, seen: set[str]
) -> dict[str, str]:
    """First tokens of texts -> the text: at most ``count``. None is in ``seen``, to which they are added.

    Beginnings whose text gives the tokenizer other ids are left out.
    """
    found: dict[str, str] = {}
    while len(found) < count and (text := next(texts, None)) is not None:
        ids = tokenizer(text)["input_ids"][:tokens]
        prompt = str(tokenizer.decode(ids, skip_special_tokens=True))
        if len(ids) == tokens and prompt not in seen and tokenizer(prompt)["input_ids"] == ids:
            found[prompt] = text
            seen.add(prompt)
    return found


def _write(file: Path, rows: Iterator[Mapping[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
