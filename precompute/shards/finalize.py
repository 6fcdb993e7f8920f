"""Which shards are done, and the manifest that covers them."""

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from dpo_opt.precompute.shards.plan import ranges_of, read_plan
from dpo_opt.precompute.shards.throughput import WorkerThroughput, throughput
from dpo_opt.schemas.errors import DataError, DpoOptError, FingerprintError, quoted
from dpo_opt.schemas.fingerprint import ALL_FIELDS, refuse_differences
from dpo_opt.schemas.locations import AnyPath, is_file, read_all, remove, sizes
from dpo_opt.schemas.manifest import (
    ATTEMPT,
    COMMITS,
    DATA,
    DROPPED,
    INDEX,
    MANIFEST,
    PLAN,
    TOKENIZER,
    Manifest,
    Plan,
    ShardCommit,
    ShardRange,
    damaged,
    load_manifest,
    parse,
    resume_command,
    to_json,
    write_manifest,
)
from dpo_opt.schemas.shard_folder import verified_file
from dpo_opt.schemas.shards import INDEX_GROUP_ROWS, INDEX_SCHEMA, write_table
from dpo_opt.schemas.storage import publish, sha256_file, sha256_folder, write_text


class Status(BaseModel):
    """How far a folder is."""

    shards_total: int
    shards_committed: int
    pairs_total: int
    """Source rows, without those that ``--data-share`` leaves out."""
    pairs_kept: int
    pairs_dropped: int
    dropped: dict[str, int]
    share_done: float
    """Of the source rows."""
    pairs_per_second: float | None
    """Source rows, of all workers, of late. Here and below: None where no commit says when it was made."""
    seconds_left: float | None
    """None also where nothing is left, and where nobody has committed for long."""
    seconds_since_commit: float | None
    workers: list[WorkerThroughput]
    finalized: bool


def committed(shards_dir: AnyPath, plan: Plan) -> dict[int, ShardCommit]:
    """One commit per finished shard: of several attempts the smallest id, so that all readers agree.

    Commits of another plan, and commits whose file is gone or has another size, do not count. What a manifest
    names stays, whatever attempt comes later.
    """
    final = {commit.shard: commit for commit in _finalized(shards_dir)}
    names: dict[int, list[str]] = {}
    for name in sorted(sizes(shards_dir / COMMITS)):
        if name.endswith(".json") and name.partition("-")[0].isdecimal():
            names.setdefault(int(name.partition("-")[0]), []).append(name)
    # After the commits: whoever commits has written the data before.
    data = sizes(shards_dir / DATA)
    found = {
        planned.shard: final[planned.shard]
        for planned in plan.shards
        if planned.shard in final and _is_valid(final[planned.shard], planned, plan, data)
    }
    left = {planned.shard: planned for planned in plan.shards if planned.shard not in found}
    wanted = [name for shard in left for name in names.get(shard, [])]
    # One that gc has just removed is not there.
    for name, text in read_all(shards_dir / COMMITS, wanted).items():
        commit = read_commit(text)
        planned = left[int(name.partition("-")[0])]
        if commit and planned.shard not in found and _is_valid(commit, planned, plan, data):
            found[planned.shard] = commit
    return found


def read_commit(text: bytes) -> ShardCommit | None:
    """A commit's record; None where it cannot be read, which is no commit: its shard is scored again."""
    try:
        return ShardCommit.model_validate_json(text)
    except ValidationError:
        return None


def _finalized(shards_dir: AnyPath) -> list[ShardCommit]:
    """What the manifest names; nothing before the first one.

    Raises:
        DataError: The manifest is damaged.
    """
    return load_manifest(shards_dir).shards if is_file(shards_dir / MANIFEST) else []


def is_committed(shards_dir: AnyPath, planned: ShardRange, plan: Plan) -> bool:
    """Whether a shard is finished now; looks at this shard's commits only."""
    prefix = f"{planned.shard:05d}-"
    names = [name for name in sizes(shards_dir / COMMITS, prefix=prefix) if name.endswith(".json")]
    if not names:
        return False
    data = sizes(shards_dir / DATA, prefix=prefix)
    commits = map(read_commit, read_all(shards_dir / COMMITS, names).values())
    return any(commit and _is_valid(commit, planned, plan, data) for commit in commits)


def _is_valid(commit: ShardCommit, planned: ShardRange, plan: Plan, data: Mapping[str, int]) -> bool:
    return is_of(commit, planned, plan) and data.get(commit.file.removeprefix(f"{DATA}/")) == commit.bytes


def is_of(commit: ShardCommit, planned: ShardRange, plan: Plan) -> bool:
    """Whether a commit says that it holds a planned shard, whole; its files may be gone or damaged."""
    return (
        all(getattr(commit, name) == value for name, value in planned)
        and commit.rows + sum(commit.dropped.values()) == planned.used
        and commit.fingerprint == plan.fingerprint
        # A manifest that names a file outside the folder is one that nobody can read.
        and commit.dropped_file in _dropped_names(commit.file)
    )


def _dropped_names(file: str) -> tuple[str, str]:
    """Where the dropped rows of a data file's attempt are: now, and before they had a folder of their own."""
    attempt = file.removeprefix(f"{DATA}/").removesuffix(".parquet")
    return f"{DROPPED}/{attempt}.parquet", f"{DATA}/{attempt}.dropped.parquet"


def status(shards_dir: AnyPath) -> Status:
    """Progress of a folder, from its commits.

    Raises:
        DataError: The folder has no plan.
    """
    plan = read_plan(shards_dir)
    done = committed(shards_dir, plan)
    dropped: Counter[str] = Counter()
    for commit in done.values():
        dropped.update(commit.dropped)
    scored = sum(commit.used for commit in done.values())
    rates = throughput(done.values(), rows_left=plan.used - scored, now=datetime.now(UTC))
    return Status(
        shards_total=len(plan.shards),
        shards_committed=len(done),
        pairs_total=plan.used,
        pairs_kept=sum(c.rows for c in done.values()),
        pairs_dropped=sum(dropped.values()),
        dropped=dict(sorted(dropped.items())),
        share_done=scored / plan.used,
        **rates._asdict(),
        finalized=is_finalized(shards_dir, plan),
    )


def is_finalized(shards_dir: AnyPath, plan: Plan) -> bool:
    """Whether a manifest covers the plan: this fingerprint, this data, these shards.

    One of a smaller plan is followed until the next is written.

    Raises:
        DataError: The manifest is damaged.
    """
    return is_file(shards_dir / MANIFEST) and _covers(load_manifest(shards_dir), plan)


def _covers(manifest: Manifest, plan: Plan) -> bool:
    of_manifest = (manifest.fingerprint, manifest.dataset_digest, ranges_of(manifest))
    return of_manifest == (plan.fingerprint, plan.dataset_digest, plan.shards)


def require_beginning(manifest: Manifest, plan: Plan, shards_dir: AnyPath) -> None:
    """Refuse to replace a manifest by one of other data or another model.

    Raises:
        FingerprintError: The manifest is not of the plan's first shards.
    """
    fix = f"restore the {PLAN} that belongs to {MANIFEST}, or pass another --shards folder"
    refuse_differences(
        cached=manifest.fingerprint,
        current=plan.fingerprint,
        fields=ALL_FIELDS,
        where=str(shards_dir),
        fix=fix,
    )
    if ranges_of(manifest) != plan.shards[: len(manifest.shards)]:
        raise FingerprintError(
            f"{MANIFEST} is of {manifest.rows} rows with digest {manifest.dataset_digest[:16]}..., the plan "
            f"of {plan.rows} rows with digest {plan.dataset_digest[:16]}...",
            where=str(shards_dir),
            why="finished log-probs would be replaced by those of other data",
            fix=fix,
        )


def finalize(shards_dir: AnyPath, *, own: Plan | None = None) -> Manifest:
    """Check that the committed shards cover the plan exactly, and write index and manifest.

    Idempotent: a folder that is finalized keeps its manifest; one that has grown keeps the entries of it.

    Args:
        shards_dir: The folder.
        own: What the caller has scored: enough where the folder grew meanwhile and others are at the rest.

    Raises:
        DataError: Shards are missing, a file changed after its commit, or no pair was kept.
        FingerprintError: The folder holds the manifest of something else than its plan.
    """
    plan = read_plan(shards_dir)
    if own is not None and own.rows < plan.rows and len(committed(shards_dir, plan)) < len(plan.shards):
        plan = own
    grown = is_file(shards_dir / MANIFEST)
    if grown:
        there = _attempts(shards_dir)
        manifest = load_manifest(shards_dir)
        for commit in manifest.shards:
            _require_present(shards_dir, commit, there[DATA])
        if _covers(manifest, plan):
            _remove_lost_attempts(shards_dir, manifest, there)
            _remove_if_allowed(shards_dir / _choice_name(plan))
            return manifest
        require_beginning(manifest, plan, shards_dir)
    done = committed(shards_dir, plan)
    missing = [r.shard for r in plan.shards if r.shard not in done]
    if missing:
        listed = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise DataError(
            f"{len(missing)} of {len(plan.shards)} shards are not scored yet ({listed})",
            where=str(shards_dir),
            why="pairs would be missing from training",
            fix=resume_command(shards_dir),
        )
    dropped: Counter[str] = Counter()
    tables = []
    for planned in plan.shards:
        commit = done[planned.shard]
        with verified_file(shards_dir, commit.dropped_file, commit.dropped_sha256):
            pass
        dropped.update(commit.dropped)
        with verified_file(shards_dir, commit.file, commit.sha256) as file:
            tables.append(_index_rows(file, planned.shard))
    kept = sum(done[r.shard].rows for r in plan.shards)
    if kept == 0:
        raise DataError(
            f"no pair is left of {plan.rows} ({json.dumps(dict(dropped))})", where=str(shards_dir)
        )
    # Readers follow the manifest that is there until the next one stands, and that one's index.
    index, index_sha256 = _write_index(
        shards_dir, f"index-{plan.rows}.parquet" if grown else INDEX, pa.concat_tables(tables)
    )
    manifest = Manifest(
        fingerprint=plan.fingerprint,
        dataset_digest=plan.dataset_digest,
        rows=plan.rows,
        kept=kept,
        dropped=dict(sorted(dropped.items())),
        truncated=sum(done[r.shard].truncated for r in plan.shards),
        tokens=sum(done[r.shard].tokens for r in plan.shards),
        pairs_per_shard=plan.pairs_per_shard,
        shards=[done[r.shard] for r in plan.shards],
        index_file=index,
        index_sha256=index_sha256,
        tokenizer_sha256=sha256_folder(shards_dir / TOKENIZER),
    )
    manifest = _settle(shards_dir, manifest, plan)
    there = _attempts(shards_dir)
    _remove_lost_attempts(shards_dir, load_manifest(shards_dir), there)
    return manifest


def _settle(shards_dir: AnyPath, manifest: Manifest, plan: Plan) -> Manifest:
    """Publish a manifest, or the one that another ``finalize`` of the same plan chose first.

    The two may have seen other attempts at a shard, and what a published manifest does not name is removed.
    So each writes its choice where none can be replaced, and all publish the one that stands there.
    """
    choice = _choice_name(plan)
    while True:
        with contextlib.suppress(FileExistsError):
            write_manifest(shards_dir, manifest, name=choice, replace=False)
        text = read_all(shards_dir, [choice]).get(choice)
        # Asked last: another choice can be there only after the first one was published and removed.
        if is_finalized(shards_dir, plan):
            remove(shards_dir / choice)
            return load_manifest(shards_dir)
        chosen = None if text is None else _usable(shards_dir, text, plan, own=manifest)
        if text is not None and chosen is not None:
            write_text(shards_dir / MANIFEST, text.decode("utf-8"))
        if text is not None:
            remove(shards_dir / choice)
        if chosen is not None:
            return chosen


def _choice_name(plan: Plan) -> str:
    """That of a private file, of which nobody takes notice; equal for all that finalize the same plan."""
    return f".{MANIFEST}.{hashlib.sha256(to_json(plan).encode()).hexdigest()[:8]}.tmp"


def _usable(shards_dir: AnyPath, text: bytes, plan: Plan, *, own: Manifest) -> Manifest | None:
    """A choice whose files are all there: one that a killed process left may be of files long removed."""
    try:
        chosen = parse(Manifest, text, where=shards_dir)
    except DataError:
        return None
    if chosen == own:
        return own
    data = sizes(shards_dir / DATA)
    ranges = zip(chosen.shards, plan.shards, strict=False)
    records = sizes(shards_dir / COMMITS)
    final = _finalized(shards_dir)
    whole = _covers(chosen, plan) and all(
        _is_valid(c, planned, plan, data) and (c in final or f"{c.shard:05d}-{c.attempt}.json" in records)
        for c, planned in ranges
    )
    return chosen if whole else None


def _attempts(shards_dir: AnyPath) -> dict[str, dict[str, int]]:
    """Folder to names and sizes, for the folders that hold attempts' files: records first."""
    return {folder: sizes(shards_dir / folder) for folder in (COMMITS, DATA, DROPPED)}


def _remove_lost_attempts(
    shards_dir: AnyPath, manifest: Manifest, there: Mapping[str, Mapping[str, int]]
) -> None:
    """Remove what other attempts wrote at the manifest's shards: all of ``data/`` is then each pair once.

    Records go first, so that no commit is ever left without its files.

    Args:
        shards_dir: Folder of reference shards.
        manifest: Its manifest.
        there: ``_attempts`` from before the manifest was read: what a later one names is not among them.
    """
    settled = {commit.shard for commit in manifest.shards}
    named = {
        name
        for commit in manifest.shards
        for name in (record_name(commit.shard, commit.attempt), commit.file, commit.dropped_file)
    }
    for folder, name in ((folder, name) for folder, names in there.items() for name in names):
        found = ATTEMPT.fullmatch(name)
        if found and int(found["shard"]) in settled and f"{folder}/{name}" not in named:
            _remove_if_allowed(shards_dir / folder / name)


def withdraw_if_lost(shards_dir: AnyPath, shard: int, attempt: str) -> bool:
    """Remove one's own attempt at a shard where the manifest names another, whose file is there.

    Raises:
        DataError: The manifest is damaged.
    """
    winner = next((commit for commit in _finalized(shards_dir) if commit.shard == shard), None)
    if winner is None or winner.attempt == attempt:
        return False
    data = sizes(shards_dir / DATA, prefix=f"{shard:05d}-")
    if data.get(winner.file.removeprefix(f"{DATA}/")) != winner.bytes:
        return False
    file = f"{DATA}/{shard:05d}-{attempt}.parquet"
    for name in (record_name(shard, attempt), file, *_dropped_names(file)):
        _remove_if_allowed(shards_dir / name)
    return True


def record_name(shard: int, attempt: str) -> str:
    """The file of a commit, relative to the folder of shards."""
    return f"{COMMITS}/{shard:05d}-{attempt}.json"


def _remove_if_allowed(path: AnyPath) -> None:
    """Whoever may write but not delete leaves it; no reader of the manifest minds, and `gc` removes it."""
    with contextlib.suppress(OSError, DpoOptError):
        remove(path)


def _write_index(shards_dir: AnyPath, name: str, table: pa.Table) -> tuple[str, str]:
    """Publish the index; returns its name and hash.

    Another ``finalize`` may have put one there of other attempts, for a manifest of its own: it stays.
    """
    with tempfile.TemporaryDirectory(prefix="dpo-opt-") as own:
        file = Path(own) / name
        write_table(file, table, row_group_rows=INDEX_GROUP_ROWS)
        sha256 = sha256_file(file)
        for place in (shards_dir / name, shards_dir / f"{Path(name).stem}-{sha256[:8]}.parquet"):
            try:
                with publish(place, replace=False) as private:
                    shutil.copyfile(file, private)
            except FileExistsError:
                if sha256_file(place) != sha256:
                    continue
            return place.name, sha256
    raise DataError(
        "the index was damaged after it was written",
        where=str(place),
        why="the manifest would name it",
        fix=f"rm {quoted(place)}, then dpo-opt finalize --shards {quoted(shards_dir)}",
    )


def _require_present(shards_dir: AnyPath, commit: ShardCommit, data: Mapping[str, int]) -> None:
    """Notice a lost or cut file without reading it; whoever reads it compares its hash."""
    size = data.get(commit.file.removeprefix(f"{DATA}/"))
    if size != commit.bytes:
        raise damaged(
            "the file is missing" if size is None else f"the file has {size} bytes of {commit.bytes}",
            shards_dir / commit.file,
            shards_dir,
            why="the manifest names it, so pairs would be missing from training",
        )


def _index_rows(path: Path, shard: int) -> pa.Table:
    names = [n for n in INDEX_SCHEMA.names if n not in ("shard", "row_group")]
    with pq.ParquetFile(path) as file:
        parts = []
        for group in range(file.num_row_groups):
            part = file.read_row_group(group, columns=names)
            part = part.append_column("shard", pa.array([shard] * len(part), pa.int32()))
            parts.append(part.append_column("row_group", pa.array([group] * len(part), pa.int32())))
    if not parts:
        return INDEX_SCHEMA.empty_table()
    return pa.concat_tables(parts).select(INDEX_SCHEMA.names).cast(INDEX_SCHEMA)
