"""How one shard's result becomes durable, and which results count.

A worker writes the data file, reads it back from the disk, and writes the commit last. So a commit is never
seen before its data, and a worker that is killed leaves at most files that no commit names.
"""

import contextlib
import socket
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime

from pydantic import ValidationError

from dpo_opt.precompute.engine.score_pairs import ScoredPairs
from dpo_opt.schemas.attempts import AttemptName, commit_names, prefix_of
from dpo_opt.schemas.errors import DataError, DpoOptError
from dpo_opt.schemas.fingerprint import Fingerprint
from dpo_opt.schemas.locations import AnyPath, is_file, on_this_machine, read_all, remove, sizes
from dpo_opt.schemas.manifest import (
    COMMITS,
    DATA,
    MANIFEST,
    Plan,
    ShardCommit,
    ShardRange,
    load_manifest,
    to_json,
)
from dpo_opt.schemas.shards import DroppedRow, read_row_groups, write_dropped, write_shard
from dpo_opt.schemas.storage import removed_meanwhile, sha256_file, write_text


def write_commit(
    shards_dir: AnyPath,
    planned: ShardRange,
    scored: ScoredPairs,
    dropped: Sequence[DroppedRow],
    *,
    prompts_cut: Collection[int],
    fingerprint: Fingerprint,
    worker: int | None,
    begun: float,
) -> ShardCommit | None:
    """Write a shard's data, read it back from the disk, and commit it.

    Args:
        shards_dir: Folder of reference shards.
        planned: The shard.
        scored: Its pairs, in order.
        dropped: Its other rows, in order.
        prompts_cut: Rows whose prompt was cut, whether they are among the pairs or not.
        fingerprint: Of the plan.
        worker: Number of the worker that scored them; None for the only one.
        begun: When it began, by ``time.monotonic``.

    Returns:
        The commit; None where a manifest already names another attempt, and this one's files are removed.

    Raises:
        DataError: A file that was written cannot be read.
        DpoOptError: What is on the disk is not what was written; or the disk is full, or the store refuses.
    """
    attempt = AttemptName.new(planned.shard)
    data, left_out = attempt.data_file, attempt.dropped_files[0]
    write_shard(shards_dir / data, scored.pairs, fingerprint=fingerprint, shard=planned.shard)
    write_dropped(shards_dir / left_out, dropped)
    try:
        with on_this_machine(shards_dir / data) as file:
            on_disk = [pair.pair_id for group in read_row_groups(file) for pair in group]
            size, sha256 = file.stat().st_size, sha256_file(file)
        dropped_sha256 = sha256_file(shards_dir / left_out)
    except (DataError, FileNotFoundError) as error:
        # `finalize` removes the files of attempts that its manifest does not name.
        if withdraw_if_lost(shards_dir, attempt, planned, fingerprint):
            return None
        if isinstance(error, FileNotFoundError):
            raise removed_meanwhile(shards_dir / data) from error
        raise
    if on_disk != [p.pair_id for p in scored.pairs]:
        raise DpoOptError("the shard read back from disk is not what was written", where=data)
    commit = ShardCommit(
        **planned.model_dump(),
        attempt=attempt.id,
        file=data,
        rows=len(scored.pairs),
        bytes=size,
        sha256=sha256,
        dropped_file=left_out,
        dropped_sha256=dropped_sha256,
        dropped=dict(sorted(Counter(row.reason for row in dropped).items())),
        truncated=sum(p.truncated for p in scored.pairs),
        prompts_truncated=sum(p.row in prompts_cut for p in scored.pairs),
        tokens=sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in scored.pairs),
        unique_sequences=scored.unique_sequences,
        fingerprint=fingerprint,
        host=socket.gethostname(),
        worker=worker,
        finished=datetime.now(UTC),
        seconds=time.monotonic() - begun,
    )
    write_text(shards_dir / attempt.commit_file, to_json(commit))
    return None if withdraw_if_lost(shards_dir, attempt, planned, fingerprint) else commit


def withdraw_if_lost(
    shards_dir: AnyPath, attempt: AttemptName, planned: ShardRange, fingerprint: Fingerprint
) -> bool:
    """Remove an attempt's own files where the manifest names another attempt, whose data file is there.

    The manifest of other data or another model, of a folder that took this one's place, does not count.

    Raises:
        DataError: The manifest is damaged.
    """
    final = manifest_commits(shards_dir)
    winner = next((commit for commit in final if is_at(commit, planned, fingerprint)), None)
    if winner is None or winner.attempt == attempt.id:
        return False
    data = sizes(shards_dir / DATA, prefix=prefix_of(attempt.shard))
    if data.get(winner.file.removeprefix(f"{DATA}/")) != winner.bytes:
        return False
    for name in (attempt.commit_file, attempt.data_file, *attempt.dropped_files):
        remove_if_allowed(shards_dir / name)
    return True


def remove_if_allowed(path: AnyPath) -> None:
    """Remove a file of a lost attempt. A process that may write but not delete leaves it to ``gc``.

    No reader of the manifest looks at the file.
    """
    with contextlib.suppress(OSError, DpoOptError):
        remove(path)


def committed(shards_dir: AnyPath, plan: Plan) -> dict[int, ShardCommit]:
    """Shard number to its commit, for every finished shard.

    Of several attempts at a shard the one with the smallest id counts, so that all readers agree. Commits of
    another plan do not count, and neither do commits whose file is gone or has another size. A commit that
    the manifest names keeps its place, whatever attempt comes later.
    """
    final = {commit.shard: commit for commit in manifest_commits(shards_dir)}
    names = commit_names(sizes(shards_dir / COMMITS))
    # Listed after the commits: a commit is written after its data, so each commit above finds its file here.
    data = sizes(shards_dir / DATA)
    found = {
        planned.shard: final[planned.shard]
        for planned in plan.shards
        if planned.shard in final and is_valid(final[planned.shard], planned, plan, data)
    }
    left = {planned.shard: planned for planned in plan.shards if planned.shard not in found}
    wanted = sorted(name for name, attempt in names.items() if attempt.shard in left)
    # `commit_texts` leaves out a commit that `gc` has removed since the listing.
    for name, text in commit_texts(shards_dir, wanted).items():
        commit = record_of(names[name], text)
        planned = left[names[name].shard]
        if commit and planned.shard not in found and is_valid(commit, planned, plan, data):
            found[planned.shard] = commit
    return found


def is_committed(shards_dir: AnyPath, planned: ShardRange, plan: Plan) -> bool:
    """Whether a shard is finished now; looks at this shard's commits only."""
    prefix = prefix_of(planned.shard)
    names = commit_names(sizes(shards_dir / COMMITS, prefix=prefix))
    if not names:
        return False
    data = sizes(shards_dir / DATA, prefix=prefix)
    texts = commit_texts(shards_dir, list(names)).items()
    commits = [record_of(names[name], text) for name, text in texts]
    return any(commit and is_valid(commit, planned, plan, data) for commit in commits)


def commit_texts(shards_dir: AnyPath, names: Sequence[str]) -> dict[str, bytes]:
    """The bytes of those of some commits that are there, by their names without the folder.

    Raises:
        DataError: One is a link out of the folder. The message names the whole folder.
    """
    texts = read_all(shards_dir, [f"{COMMITS}/{name}" for name in names])
    return {name.removeprefix(f"{COMMITS}/"): text for name, text in texts.items()}


def read_commit(text: bytes) -> ShardCommit | None:
    """A commit's record. None where it cannot be read: it does not count, and its shard is scored again."""
    try:
        return ShardCommit.model_validate_json(text)
    except ValidationError:
        return None


def record_of(attempt: AttemptName, text: bytes) -> ShardCommit | None:
    """The record in an attempt's commit; None if it cannot be read, or names another attempt."""
    commit = read_commit(text)
    return commit if commit and (commit.shard, commit.attempt) == attempt else None


def manifest_commits(shards_dir: AnyPath) -> list[ShardCommit]:
    """The commits that the manifest names; empty where there is no manifest yet.

    Raises:
        DataError: The manifest is damaged.
    """
    return load_manifest(shards_dir).shards if is_file(shards_dir / MANIFEST) else []


def is_valid(commit: ShardCommit, planned: ShardRange, plan: Plan, data: Mapping[str, int]) -> bool:
    """Whether a commit holds a planned shard, and its data file has the size that it states.

    Args:
        commit: The record.
        planned: The shard.
        plan: Of the folder.
        data: Names of the files of ``data/`` to their bytes.
    """
    return is_of(commit, planned, plan) and data.get(commit.file.removeprefix(f"{DATA}/")) == commit.bytes


def is_of(commit: ShardCommit, planned: ShardRange, plan: Plan) -> bool:
    """Whether a commit says that it holds a planned shard, whole; its files may be gone or damaged."""
    attempt = AttemptName.parse(commit.file.removeprefix(f"{DATA}/"))
    return (
        is_at(commit, planned, plan.fingerprint)
        and commit.rows + sum(commit.dropped.values()) == planned.used
        and min(commit.rows, commit.truncated, commit.tokens, *commit.dropped.values()) >= 0
        and 0 <= (commit.prompts_truncated or 0) <= commit.rows
        # `load_manifest` would refuse a manifest that names a file outside the folder. And of a commit that
        # names another attempt's files, `finalize` would remove the files of its own attempt.
        and attempt is not None
        and attempt == AttemptName(planned.shard, commit.attempt)
        and commit.file == attempt.data_file
        and commit.dropped_file in attempt.dropped_files
    )


def is_at(commit: ShardCommit, planned: ShardRange, fingerprint: Fingerprint) -> bool:
    """Whether a commit is of these rows and this model, whatever it says of its files."""
    same_rows = all(getattr(commit, name) == getattr(planned, name) for name in ShardRange.model_fields)
    return same_rows and commit.fingerprint == fingerprint
