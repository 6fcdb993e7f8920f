"""What killed and repeated attempts left behind: removed on request only, and only what nobody may want."""

import re
import secrets
from typing import NamedTuple

from dpo_opt.precompute.commits import read_commit
from dpo_opt.precompute.plan import read_plan
from dpo_opt.schemas.locations import AnyPath, explained, is_file, read_all, remove, sizes
from dpo_opt.schemas.manifest import ATTEMPT, COMMITS, DATA, DROPPED, MANIFEST, ShardCommit, load_manifest

# Names that this program gives; anything else in the folder is somebody's, and stays.
_INDEX = re.compile(r"index(-\d+)?(-[0-9a-f]{8})?\.parquet")
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
    with explained(shards_dir):
        now = _filesystem_time(shards_dir)
        # Until then readers followed the one before, and its index.
        manifest_time = _time_of(shards_dir / MANIFEST)
    found = []
    total = 0
    for folder in (shards_dir, shards_dir / DATA, shards_dir / DROPPED, shards_dir / COMMITS):
        for name, size in sorted(sizes(folder).items()):
            old_index = folder == shards_dir and _INDEX.fullmatch(name)
            attempt = folder != shards_dir and ATTEMPT.fullmatch(name)
            inside = name if folder == shards_dir else f"{folder.name}/{name}"
            if not (old_index or attempt or _PRIVATE.fullmatch(name)) or inside in kept:
                continue
            with explained(folder):
                written = _time_of(folder / name)
            if written is None:
                continue  # its writer has given it its final name
            if old_index and manifest_time is not None:
                written = max(written, manifest_time)
            if now - written >= older_than_hours * 3600:
                found.append(folder / name)
                total += size
    return Garbage(found, total)


def remove_garbage(garbage: Garbage) -> None:
    """Delete the files: records before data, so that no commit is ever left without its file.

    Raises:
        DpoOptError: The store does not answer, or refuses.
    """
    for path in sorted(garbage.files, key=lambda path: path.parent.name != COMMITS):
        remove(path)


def _wanted(shards_dir: AnyPath) -> set[str]:
    """Files that a manifest names, and every attempt at a shard that none names yet."""
    read_plan(shards_dir)  # else it is no folder of shards
    kept: list[ShardCommit] = []
    index: set[str] = set()
    if is_file(shards_dir / MANIFEST):
        manifest = load_manifest(shards_dir)
        kept, index = manifest.shards, {manifest.index_file}
    settled = {commit.shard for commit in kept}
    names = [
        name
        for name in sizes(shards_dir / COMMITS)
        if ATTEMPT.fullmatch(name) and int(name.partition("-")[0]) not in settled
    ]
    records = map(read_commit, read_all(shards_dir / COMMITS, names).values())
    commits = [*kept, *filter(None, records)]
    return index | {
        name
        for commit in commits
        for name in (commit.file, commit.dropped_file, f"{COMMITS}/{commit.shard:05d}-{commit.attempt}.json")
    }


def _time_of(path: AnyPath) -> float | None:
    """When a file was written; None where it is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _filesystem_time(folder: AnyPath) -> float:
    """Now, as the file system that dates the files says it: this machine's clock may be wrong."""
    probe = folder / f".clock.{secrets.token_hex(4)}.tmp"
    try:
        probe.touch(exist_ok=False)
        return probe.stat().st_mtime
    finally:
        remove(probe)
