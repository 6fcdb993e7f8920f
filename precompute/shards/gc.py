"""``dpo-opt gc``: removes what killed and repeated attempts left, and nothing that a reader may need."""

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from dpo_opt.precompute.shards.commits import commit_texts, read_commit
from dpo_opt.precompute.shards.finished import covers
from dpo_opt.precompute.shards.read_plan import read_plan, read_plans
from dpo_opt.schemas.attempts import AttemptName, commit_names
from dpo_opt.schemas.locations import AnyPath, is_file, remove, sizes
from dpo_opt.schemas.manifest import (
    COMMITS,
    DATA,
    DROPPED,
    MANIFEST,
    SLURM,
    TOKENIZER,
    Manifest,
    Plan,
    load_manifest,
)
from dpo_opt.schemas.sidecars import COLUMNS, is_planned_file
from dpo_opt.schemas.storage import files_below
from dpo_opt.schemas.store_errors import explained

# Names that this program gives. Files with other names belong to somebody else, and stay.
_INDEX = re.compile(r"index(-\d+)?(-[0-9a-f]{8})?\.parquet")
_CLAIM = re.compile(r"(?P<plan>plan(-\d+)?\.json)\.claim")
# A name may hold a newline.
_PRIVATE = re.compile(r"\..+\.[0-9a-f]{8}\.tmp", re.DOTALL)
_FOLDERS = (DATA, DROPPED, COMMITS, COLUMNS, TOKENIZER, SLURM)


class Garbage(NamedTuple):
    """Files that no reader will ever need."""

    files: list[AnyPath]
    size: int
    """In bytes."""
    folders: list[Path]
    """Private folders, whose files are listed too."""


def is_private(name: str) -> bool:
    """Whether a file is one that was being written, or is in a folder that was.

    Args:
        name: Relative to the folder of shards.
    """
    first, *rest = name.split("/")
    in_a_folder = first in _FOLDERS and len(rest) == 1
    return _PRIVATE.fullmatch(rest[0] if in_a_folder else first) is not None


def is_index(name: str) -> bool:
    """Whether a file is an index, of this manifest or another one."""
    return _INDEX.fullmatch(name) is not None


def is_claim(name: str) -> bool:
    """Whether a run wrote the file before a plan of its own."""
    return _CLAIM.fullmatch(name) is not None


def is_spent_claim(name: str, there: Collection[str]) -> bool:
    """Whether a claim's plan is written. Only a killed run leaves such a claim, and nothing reads it.

    Args:
        name: Relative to the folder of shards.
        there: The folder's files.
    """
    claim = _CLAIM.fullmatch(name)
    return claim is not None and claim["plan"] in there


def columns_in_use(plans: Iterable[Plan], manifest: Manifest | None) -> set[str]:
    """The files of columns that a plan or the manifest names, relative to the folder of shards."""
    named = [plan.columns for plan in plans] + ([] if manifest is None else [manifest.columns])
    return {file for columns in named for file in (columns or {}).values()}


def find_garbage(shards_dir: AnyPath, *, older_than_hours: float, look_only: bool = False) -> Garbage:
    """Private files, lost attempts, spent claims and columns of no plan that were written some hours ago.

    Before ``finalize`` every committed attempt stays, and every index. An attempt without a commit may be a
    slow worker's, so young files stay too. A claim without its plan stays, because the run that planned may
    continue; it writes the columns of that plan again.

    Args:
        shards_dir: Folder of reference shards.
        older_than_hours: Least age of what is found, by the file system's clock. To read that clock, the
            program writes a file and removes it.
        look_only: Write nothing, and use this machine's clock.

    Raises:
        DataError: The folder has no plan, or its manifest is damaged.
    """
    kept = _wanted(shards_dir)
    with explained(shards_dir):
        now = time.time() if look_only else _filesystem_time(shards_dir)
        # Until then readers followed the manifest before, and its index.
        manifest_time = _time_of(shards_dir / MANIFEST)
    found: list[AnyPath] = []
    total = 0
    own = sizes(shards_dir)
    names = [*own.items()]
    names += [(f"{f}/{name}", size) for f in _FOLDERS for name, size in sizes(shards_dir / f).items()]
    for name, size in sorted(names):
        old_index = is_index(name)
        folder, _, file = name.rpartition("/")
        attempt = AttemptName.parse(file) if folder in (DATA, DROPPED, COMMITS) else None
        of_attempt = attempt is not None and attempt.is_generated
        of_plan = is_planned_file(name) or is_spent_claim(name, own)
        if not (old_index or of_attempt or of_plan or is_private(name)) or name in kept:
            continue
        with explained(shards_dir):
            written = _time_of(shards_dir / name)
        if written is None:
            continue  # its writer has just renamed it
        if old_index and manifest_time is not None:
            written = max(written, manifest_time)
        if now - written >= older_than_hours * 3600:
            found.append(shards_dir / name)
            total += size
    folders = [folder for folder in _private_folders(shards_dir) if _is_older(folder, now, older_than_hours)]
    inside = [path for folder in folders for path in sorted(files_below(folder))]
    for path in inside:
        with contextlib.suppress(FileNotFoundError):
            total += path.lstat().st_size
    return Garbage([*found, *inside], total, folders)


def remove_garbage(garbage: Garbage) -> None:
    """Delete it: commits before data, so that no commit is ever left without its file.

    Raises:
        DpoOptError: The store does not answer, or refuses.
    """
    for path in sorted(garbage.files, key=lambda path: path.parent.name != COMMITS):
        remove(path)
    for folder in garbage.folders:
        shutil.rmtree(folder, ignore_errors=True)


def _private_folders(shards_dir: AnyPath) -> list[Path]:
    """None in a store, where every file is sent whole."""
    if not isinstance(shards_dir, Path):
        return []
    return sorted(p for p in shards_dir.iterdir() if _PRIVATE.fullmatch(p.name) and p.is_dir())


def _is_older(folder: Path, now: float, hours: float) -> bool:
    files = list(files_below(folder))
    times = map(_time_of, {folder, *files, *(path.parent for path in files)})
    return all(now - written >= hours * 3600 for written in times if written is not None)


def _wanted(shards_dir: AnyPath) -> set[str]:
    plans = read_plans(shards_dir) or [read_plan(shards_dir)]  # refuses what is no folder of shards
    manifest = load_manifest(shards_dir) if is_file(shards_dir / MANIFEST) else None
    return wanted(shards_dir, plans, manifest)


def wanted(shards_dir: AnyPath, plans: Sequence[Plan], manifest: Manifest | None) -> set[str]:
    """Files that manifest or plans name, and every committed attempt at a shard that is in no manifest.

    A commit beyond the manifest stays even if no plan has its shard, because that plan may be lost. An index
    stays until a manifest covers the last plan: a ``finalize`` may be about to use one that is there.

    Args:
        shards_dir: Folder of reference shards.
        plans: Its plans.
        manifest: Its manifest, if there is one.
    """
    kept = [] if manifest is None else manifest.shards
    index = set() if manifest is None else {manifest.index_file}
    if manifest is None or (plans and not covers(manifest, plans[-1])):
        index |= set(filter(is_index, sizes(shards_dir)))
    in_manifest = {commit.shard for commit in kept}
    names = [
        name
        for name, attempt in commit_names(sizes(shards_dir / COMMITS)).items()
        if attempt.shard not in in_manifest
    ]
    records = map(read_commit, commit_texts(shards_dir, names).values())
    commits = [*kept, *filter(None, records)]
    return (
        columns_in_use(plans, manifest)
        | index
        | {
            name
            for commit in commits
            for name in (
                commit.file,
                commit.dropped_file,
                AttemptName(commit.shard, commit.attempt).commit_file,
            )
        }
    )


def _time_of(path: AnyPath) -> float | None:
    """When a file was written; None where it is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _filesystem_time(folder: AnyPath) -> float:
    """Now, by the clock of the file system, which dates the files; this machine's clock may be wrong."""
    probe = folder / f".clock.{secrets.token_hex(4)}.tmp"
    try:
        if isinstance(probe, Path):
            # Asked before it is closed: a `gc` beside this one may remove it.
            with probe.open("xb") as file:
                return os.fstat(file.fileno()).st_mtime
        probe.touch(exist_ok=False)
        return _time_of(probe) or _filesystem_time(folder)
    finally:
        remove(probe)
