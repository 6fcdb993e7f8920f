"""Datasets on the Hub, at a commit: which files they have, fetched or read from there."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from fsspec.utils import glob_translate

from dpo_opt.schemas.errors import ConfigError, DataError, first_line, quoted
from dpo_opt.schemas.hub import COMMIT, current_commit, fetch, list_files

PROTOCOL = "hf://datasets/"
HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<files>.+))?")
_ROOT = re.compile(rf"{PROTOCOL}[^/]+/[^/@]+@{COMMIT.pattern}")
_CARD = "README.md"


class Listing(NamedTuple):
    """The files of a dataset that are wanted."""

    base: str
    """The dataset's folder: a path in the Hub's cache, or a URL of the Hub."""
    files: list[str]
    """Paths or URLs of files below it."""
    pattern: str | None
    """What names them; None: they are all of its files."""


def hub_listing(name: str, *, suffixes: Sequence[str], streamed: bool) -> Listing:
    """The files that a name such as ``ORG/NAME@COMMIT/data/train-*.parquet`` means.

    Args:
        name: The dataset, without a protocol.
        suffixes: How the name of a file that holds pairs ends.
        streamed: The data is read once: what is not in the Hub's cache is read from the Hub, without a copy.
            Otherwise all is fetched into the cache.

    Raises:
        ConfigError: It is not pinned to a commit, a package is missing, or the Hub cannot provide it.
        DataError: It is no such name.
    """
    found = HUB_ID.fullmatch(name)
    if found is None:
        raise DataError(
            "not the name of a Hub dataset",
            where=name,
            fix="ORGANISATION/NAME@REVISION, or ORGANISATION/NAME@REVISION/data/train-*.parquet",
            kind="no_such_file",
        )
    repository, revision, pattern = found["name"], found["revision"], found["files"]
    if revision is None or not COMMIT.fullmatch(revision):
        commit = current_commit(repository, kind="dataset", revision=revision, extra="hub")
        raise ConfigError(
            f"{name!r} is not pinned to a commit",
            why="the dataset could change between planning and scoring, and nobody would know",
            fix="--data " + quoted(f"{repository}@{commit}" + (f"/{pattern}" if pattern else "")),
        )
    patterns = [pattern] if pattern else [_CARD, *(f"**{suffix}" for suffix in suffixes)]
    listed = (
        list_files(repository, kind="dataset", revision=revision, patterns=patterns) if streamed else None
    )
    if listed and not all(listed.values()):
        base = f"{PROTOCOL}{repository}@{revision}"
        files = [f"{base}/{name}" for name in _matching(list(listed), pattern)]
        return Listing(base, files, pattern)
    folder = fetch(repository, kind="dataset", revision=revision, patterns=patterns, extra="hub")
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    files = [f"{folder}/{name}" for name in _matching(names, pattern)]
    return Listing(str(folder), files, pattern)


def root_of(file: str) -> str:
    """The dataset's folder on the Hub of a file that is read from there; empty for any other."""
    found = _ROOT.match(file)
    return found[0] if found else ""


def as_named(source: str, file: str) -> str:
    """What ``--data`` calls a file or pattern of a source; one in the Hub's cache is called as on the Hub."""
    repository, at, revision = source.removeprefix(PROTOCOL).partition("@")
    revision = revision.partition("/")[0]
    _, in_cache, inside = file.partition(f"/snapshots/{revision}/")
    if at and in_cache:
        return f"{repository}@{revision}/{inside}"
    return file.removeprefix(PROTOCOL) if root_of(file) else file


def _matching(names: Sequence[str], pattern: str | None) -> list[str]:
    if pattern is None:
        return list(names)
    try:
        wanted = re.compile(glob_translate(pattern))
    except (ValueError, re.error) as error:
        raise DataError(
            f"not a pattern ({first_line(error)})",
            where=pattern,
            fix="check the pattern",
            kind="no_such_file",
        ) from error
    return [name for name in names if wanted.fullmatch(name)]
