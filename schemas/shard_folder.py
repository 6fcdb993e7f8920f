"""The one way to open a finalized folder: only files that its manifest names, with the bytes it states."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from dpo_opt.schemas.arrow_file import arrow_file
from dpo_opt.schemas.errors import DataError, DpoOptError, quoted
from dpo_opt.schemas.locations import AnyPath, fetch, inside, is_file, on_this_machine
from dpo_opt.schemas.manifest import (
    TOKENIZER,
    Manifest,
    damaged,
    load_manifest,
    resume_command,
)
from dpo_opt.schemas.pairs import ScoredPair
from dpo_opt.schemas.shards import read_row_groups
from dpo_opt.schemas.sidecars import column_path, read_column
from dpo_opt.schemas.storage import file_names, publish, sha256_file, sha256_folder


class ShardFolder:
    """A finalized folder, opened for reading: every file is hashed once, before its first use."""

    def __init__(self, path: AnyPath, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._verified: dict[str, Path] = {}

    @classmethod
    def open(cls, path: AnyPath) -> Self:
        """Open a folder.

        Raises:
            DataError: It has no valid manifest.
        """
        return cls(path, load_manifest(path))

    def index(self, columns: Sequence[str] | None = None) -> pa.Table:
        """One row per kept pair: identifiers, lengths, shard and row group (shards.INDEX_SCHEMA).

        Args:
            columns: Only these: of a million pairs the identifiers alone are 72 MB.
        """
        # Not `pq.read_table`, which takes several times the time and memory for the same columns.
        path = self._file(self.manifest.index_file, self.manifest.index_sha256)
        with arrow_file(path) as raw, pq.ParquetFile(raw) as file:
            return file.read(columns=None if columns is None else list(columns))

    def row_groups(
        self, shard: int, *, row_groups: Sequence[int] | None = None
    ) -> Iterator[list[ScoredPair]]:
        """Pairs of one shard, one list per row group, from verified bytes.

        Raises:
            DataError: The file is missing or is not the one the manifest names.
        """
        commit = self.manifest.shards[shard]
        yield from read_row_groups(self._file(commit.file, commit.sha256), row_groups=row_groups)

    @contextlib.contextmanager
    def tokenizer(self) -> Iterator[Path]:
        """Folder of the tokenizer's own files, on this machine for as long as it is used.

        Raises:
            DataError: They are not those that the manifest's hash was taken of.
        """
        path = self.path / TOKENIZER
        with on_this_machine(path, names=self.manifest.tokenizer_files) as here:
            if sha256_folder(here, whole=self.path) != self.manifest.tokenizer_sha256:
                files = map(quoted, file_names(here))
                raise damaged(
                    f"the tokenizer's files changed ({', '.join(files) or 'none is left'})",
                    path,
                    self.path,
                    why="they turn the folder's ids back into text, and become those of the trained model",
                )
            yield here

    def has_column(self, name: str) -> bool:
        """Whether the pairs have a column, such as ``weight``, beside the shards.

        Raises:
            DataError: The manifest names its file, which is missing.
        """
        path = column_path(self.path, name, self.manifest.columns)
        there = is_file(path)
        if not there and name in (self.manifest.columns or {}):
            noun = self.manifest.fingerprint.noun
            raise DataError(
                f"the {name} of the {noun}s is missing",
                where=str(path),
                why=f"the data has a {name} for some {noun}s; without it all {noun}s would count alike",
                fix=f"{resume_command(self.path)}, which takes it from the data again and scores nothing",
            )
        return there

    def column(
        self, name: str, *, rows: npt.NDArray[np.int64], default: float
    ) -> npt.NDArray[np.float64] | None:
        """A column's value at each of ``rows`` (n,): ``default`` where there is none; None: no column.

        Raises:
            DataError: As ``has_column`` and ``read_column``.
        """
        if not self.has_column(name):
            return None
        return read_column(self.path, name, files=self.manifest.columns, rows=rows, default=default)

    def pairs(self) -> Iterator[ScoredPair]:
        """Every pair, in row order, one row group in memory at a time."""
        for commit in self.manifest.shards:
            for group in self.row_groups(commit.shard):
                yield from group

    def _file(self, name: str, sha256: str) -> Path:
        if name not in self._verified:
            self._verified[name] = check_file(self.path, name, sha256)
        return self._verified[name]


def check_file(shards_dir: AnyPath, name: str, sha256: str) -> Path:
    """A file whose bytes are those that its record states; a store's file is kept in this user's cache.

    Args:
        shards_dir: Folder of reference shards.
        name: Relative to the folder.
        sha256: What the record states.

    Returns:
        The file on this machine.

    Raises:
        DataError: The file is missing or its bytes changed.
        DpoOptError: The store does not answer.
    """
    path = inside(shards_dir, name)
    if isinstance(path, Path):
        with verified_file(shards_dir, name, sha256):
            return path
    kept = cache_path(path, sha256)
    if not (kept.is_file() and sha256_file(kept) == sha256):
        try:
            with publish(kept) as private:
                _fetch_verified(path, sha256, private, shards_dir)
        except OSError as error:
            raise DpoOptError(
                f"the cache cannot be written ({error.strerror or error})",
                where=str(kept.parent),
                why="what is read from a store is kept there",
                fix="set DPO_OPT_CACHE to a folder that can be written",
            ) from error
    return kept


@contextlib.contextmanager
def verified_file(shards_dir: AnyPath, name: str, sha256: str) -> Iterator[Path]:
    """As ``check_file``; a store's file is on this machine for as long as it is used.

    Raises:
        DataError, DpoOptError: As ``check_file``.
    """
    path = inside(shards_dir, name)
    if isinstance(path, Path):
        if not path.is_file():
            raise _missing(path, shards_dir)
        try:
            _require_sha256(path, sha256, where=path, shards_dir=shards_dir)
        except FileNotFoundError as error:
            raise _missing(path, shards_dir) from error
        # Its readers may be libraries that take a relative name with a colon for a URL.
        yield path.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="dpo-opt-") as own:
        file = Path(own) / path.name
        _fetch_verified(path, sha256, file, shards_dir)
        yield file


def _fetch_verified(path: UPath, sha256: str, file: Path, shards_dir: AnyPath) -> None:
    try:
        fetch(path, file)
    except FileNotFoundError as error:
        raise _missing(path, shards_dir) from error
    _require_sha256(file, sha256, where=path, shards_dir=shards_dir)


def _missing(path: AnyPath, shards_dir: AnyPath) -> DataError:
    why = "a record names it, so pairs would be missing from training"
    return damaged("the file is missing", path, shards_dir, why=why)


def _require_sha256(file: Path, sha256: str, *, where: AnyPath, shards_dir: AnyPath) -> None:
    actual = sha256_file(file)
    if actual != sha256:
        raise damaged(
            f"the bytes changed: sha256 is {actual[:16]}..., the record says {sha256[:16]}...",
            where,
            shards_dir,
            why="its log-probs can no longer be trusted",
        )


def cache_path(path: UPath, sha256: str) -> Path:
    """Where this user's cache keeps a store's file; named by its hash, so a changed file is another one."""
    base = os.environ.get("DPO_OPT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dpo-opt"
    return Path(base).expanduser() / sha256[:2] / f"{sha256}{path.suffix}"
