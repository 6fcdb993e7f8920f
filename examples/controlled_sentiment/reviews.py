"""Reads reviews with their labels: one part is for the reward's classifier, the other for prompts."""

import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dpo_opt.schemas.errors import ConfigError, DataError, first_line

_LABELS = {".pos": True, ".neg": False}


class Review(NamedTuple):
    """One review, or a sentence of one."""

    text: str
    positive: bool


def read_reviews(corpus: Path | None) -> list[Review]:
    """All reviews, each text once.

    Args:
        corpus: A folder or zip file with a ``*.pos`` and a ``*.neg``, a review on each line, as the sentence
            polarity data set (Pang and Lee 2005) is published. None: IMDb (Maas et al. 2011) from the Hub.

    Raises:
        ConfigError: It is not there.
        DataError: It is not of this form.
    """
    if corpus is None:
        return list(dict.fromkeys(_imdb()))
    if not corpus.exists():
        raise ConfigError("there are no reviews", where=str(corpus), fix="pass --reviews with the corpus")
    try:
        found = list(dict.fromkeys(_lines(corpus)))
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"the reviews cannot be read ({first_line(error)})", where=str(corpus)) from error
    if {review.positive for review in found} != {True, False}:
        raise DataError(
            "there are not both positive and negative reviews",
            where=str(corpus),
            why="the reward is learned from the two",
            fix="pass --reviews with a folder or zip file of a *.pos and a *.neg, a review on each line",
        )
    return found


def shuffled(reviews: list[Review], share: float) -> tuple[list[Review], list[Review]]:
    """The reviews in an order that is always the same: the first ``share`` of them, and the others."""
    mixed = sorted(reviews)
    random.Random(0).shuffle(mixed)
    at = round(share * len(mixed))
    return mixed[:at], mixed[at:]


def _lines(corpus: Path) -> Iterator[Review]:
    for name, content in _files(corpus):
        for suffix, positive in _LABELS.items():
            if name.endswith(suffix):
                text = content.decode("latin-1")
                yield from (Review(line.strip(), positive) for line in text.split("\n") if line.strip())


def _files(corpus: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file of a folder or a zip file, by name."""
    if corpus.is_dir():
        yield from ((str(file), file.read_bytes()) for file in sorted(corpus.rglob("*")) if file.is_file())
        return
    with zipfile.ZipFile(corpus) as archive:
        yield from ((name, archive.read(name)) for name in sorted(archive.namelist()))


def _imdb() -> Iterator[Review]:
    from datasets import load_dataset

    for split in ("train", "test"):
        for row in load_dataset("stanfordnlp/imdb", split=split):
            yield Review(row["text"].replace("<br />", " "), bool(row["label"]))
