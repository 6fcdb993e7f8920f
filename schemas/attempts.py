"""The names of an attempt's files, built and parsed here alone.

Attempt 3f9a01bc at shard 7 writes three files:

    data/00007-3f9a01bc.parquet      the pairs that it scored
    dropped/00007-3f9a01bc.parquet   the rows that it dropped
    commits/00007-3f9a01bc.json      its commit

The id is random, so two attempts at a shard never write to the same file.
"""

import re
import secrets
from collections.abc import Iterable
from typing import NamedTuple, Self

from dpo_opt.schemas.manifest import COMMITS, DATA, DROPPED

_ID_BYTES = 4
_NAME = re.compile(r"(?P<shard>[0-9]{5,})-(?P<id>[0-9a-f]+)(\.json|\.parquet|\.dropped\.parquet)")


class AttemptName(NamedTuple):
    """One attempt at one shard, as its files are named. Paths are relative to the folder of shards."""

    shard: int
    id: str
    """Hex digits."""

    @classmethod
    def new(cls, shard: int) -> Self:
        """An attempt that no other process has."""
        return cls(shard, secrets.token_hex(_ID_BYTES))

    @classmethod
    def parse(cls, file: str) -> Self | None:
        """The attempt that a file's name states; None for a name of another form.

        Args:
            file: Name without its folder.
        """
        name = _NAME.fullmatch(file)
        return name and cls(int(name["shard"]), name["id"])

    @property
    def is_generated(self) -> bool:
        """Whether ``new`` could have made the id; files that a person adds may have longer or shorter ids."""
        return len(self.id) == 2 * _ID_BYTES

    @property
    def commit_file(self) -> str:
        return f"{COMMITS}/{self}.json"

    @property
    def data_file(self) -> str:
        return f"{DATA}/{self}.parquet"

    @property
    def dropped_files(self) -> tuple[str, str]:
        """Where the dropped rows are: now, and before ``dropped/`` existed."""
        return f"{DROPPED}/{self}.parquet", f"{DATA}/{self}.dropped.parquet"

    def __str__(self) -> str:
        return f"{prefix_of(self.shard)}{self.id}"


def prefix_of(shard: int) -> str:
    """What the names of a shard's files begin with."""
    return f"{shard:05d}-"


def commit_names(files: Iterable[str]) -> dict[str, AttemptName]:
    """The names of ``commits/`` that a commit may have, in order, each with its attempt."""
    attempts = {file: AttemptName.parse(file) for file in sorted(files) if file.endswith(".json")}
    return {file: attempt for file, attempt in attempts.items() if attempt is not None}
