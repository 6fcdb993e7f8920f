"""What killed and repeated attempts left behind: removed on request only, and only what nobody may want."""

import re
import secrets
from typing import NamedTuple

from dpo_opt.precompute.plan import read_plan
from dpo_opt.schemas.locations import AnyPath, sizes
from dpo_opt.schemas.manifest import COMMITS, DATA, MANIFEST, ShardCommit, load_manifest, parse

# Names that this program gives; anything else in the folder is somebody's, and stays.
_ATTEMPT = re.compile(r"\d{5,}-[0-9a-f]{8}(\.dropped)?\.(parquet|json)")
_PRIVATE = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


class Garbage(NamedTuple):
    """Files that no reader will ever need."""

    files: list[AnyPath]
    size: int
    """In bytes."""


def find_garbage(shards_dir: AnyPath, *, older_than_hours: float) -> Garbage:
    """Private files and attempts that lost, which nobody has written to for some hours.

    Before ``finalize`` every committed attempt stays; an attempt without a commit may be a slow worker's, so
    young files stay too. Age is told by the file system's own clock.

    Raises:
        DataError: The folder has no plan, or its manifest is damaged.
    """
    kept = _wanted(shards_dir)
    now = _filesystem_time(shards_dir)
    found = []
    for folder in (shards_dir, shards_dir / DATA, shards_dir / COMMITS):
        for name in sorted(sizes(folder)):
            ours = _PRIVATE.fullmatch(name) or (folder != shards_dir and _ATTEMPT.fullmatch(name))
            if not ours or f"{folder.name}/{name}" in kept:
                continue
            path = folder / name
            try:
                age = now - path.stat().st_mtime
            except FileNotFoundError:
                continue  # its writer has given it its final name
            if age >= older_than_hours * 3600:
                found.append(path)
    return Garbage(found, sum(path.stat().st_size for path in found))


def remove_garbage(garbage: Garbage) -> None:
    """Delete the files: records before data, so that no commit is ever left without its file."""
    for path in sorted(garbage.files, key=lambda path: path.parent.name != COMMITS):
        path.unlink(missing_ok=True)


def _wanted(shards_dir: AnyPath) -> set[str]:
    read_plan(shards_dir)  # else it is no folder of shards
    if (shards_dir / MANIFEST).is_file():
        commits = load_manifest(shards_dir).shards
    else:
        records = (shards_dir / COMMITS).glob("[0-9]*.json")
        commits = [parse(ShardCommit, path.read_bytes(), where=path) for path in records]
    return {
        name
        for commit in commits
        for name in (commit.file, commit.dropped_file, f"{COMMITS}/{commit.shard:05d}-{commit.attempt}.json")
    }


def _filesystem_time(folder: AnyPath) -> float:
    """Now, as the file system that dates the files says it: this machine's clock may be wrong."""
    probe = folder / f".clock.{secrets.token_hex(4)}.tmp"
    try:
        probe.touch(exist_ok=False)
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
