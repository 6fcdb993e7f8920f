"""Which shards are done, and the manifest that covers them."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from dpo_opt.precompute.plan import read_plan
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.manifest import (
    COMMAND,
    COMMITS,
    INDEX,
    MANIFEST,
    TOKENIZER,
    Manifest,
    Plan,
    ShardCommit,
    ShardRange,
    check_file,
    load_manifest,
    parse,
    write_manifest,
)
from dpo_opt.schemas.shards import INDEX_SCHEMA, write_table
from dpo_opt.schemas.storage import sha256_file, sha256_folder


class Status(BaseModel):
    """How far a folder is."""

    shards_total: int
    shards_committed: int
    pairs_total: int
    """Source rows."""
    pairs_kept: int
    pairs_dropped: int
    dropped: dict[str, int]
    finalized: bool


def committed(shards_dir: Path, plan: Plan) -> dict[int, ShardCommit]:
    """One commit per finished shard: of several attempts the smallest id, so that all readers agree.

    Commits of another plan, and commits whose file is gone or has another size, do not count.
    """
    names: dict[int, list[Path]] = {}
    for path in sorted((shards_dir / COMMITS).glob("[0-9]*.json")):
        names.setdefault(int(path.name.partition("-")[0]), []).append(path)
    found = {r.shard: _first_valid(shards_dir, r, plan, names.get(r.shard, [])) for r in plan.shards}
    return {shard: commit for shard, commit in found.items() if commit is not None}


def is_committed(shards_dir: Path, planned: ShardRange, plan: Plan) -> bool:
    """Whether a shard is finished now; looks at this shard's commits only."""
    paths = sorted((shards_dir / COMMITS).glob(f"{planned.shard:05d}-*.json"))
    return _first_valid(shards_dir, planned, plan, paths) is not None


def _first_valid(
    shards_dir: Path, planned: ShardRange, plan: Plan, paths: Sequence[Path]
) -> ShardCommit | None:
    for path in paths:
        commit = parse(ShardCommit, path.read_bytes(), where=path)
        belongs = (
            (commit.shard, commit.start, commit.stop) == (planned.shard, planned.start, planned.stop)
            and commit.rows_digest == planned.rows_digest
            and commit.fingerprint == plan.fingerprint
        )
        file = shards_dir / commit.file
        if belongs and file.is_file() and file.stat().st_size == commit.bytes:
            return commit
    return None


def status(shards_dir: Path) -> Status:
    """Progress of a folder, from its commits.

    Raises:
        DataError: The folder has no plan.
    """
    plan = read_plan(shards_dir)
    done = committed(shards_dir, plan)
    dropped: Counter[str] = Counter()
    for commit in done.values():
        dropped.update(commit.dropped)
    return Status(
        shards_total=len(plan.shards),
        shards_committed=len(done),
        pairs_total=plan.rows,
        pairs_kept=sum(c.rows for c in done.values()),
        pairs_dropped=sum(dropped.values()),
        dropped=dict(sorted(dropped.items())),
        finalized=(shards_dir / MANIFEST).is_file(),
    )


def finalize(shards_dir: Path) -> Manifest:
    """Check that the committed shards cover the plan exactly, and write index and manifest.

    Idempotent: a folder that is finalized already keeps its manifest.

    Raises:
        DataError: Shards are missing, a file changed after its commit, or no pair was kept.
    """
    if (shards_dir / MANIFEST).is_file():
        manifest = load_manifest(shards_dir)
        for commit in manifest.shards:
            _require_present(shards_dir, commit)
        return manifest
    plan = read_plan(shards_dir)
    done = committed(shards_dir, plan)
    missing = [r.shard for r in plan.shards if r.shard not in done]
    if missing:
        listed = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise DataError(
            f"{len(missing)} of {len(plan.shards)} shards are not scored yet ({listed})",
            where=str(shards_dir),
            why="pairs would be missing from training",
            fix=f"dpo-opt precompute --config {shards_dir / COMMAND}",
        )
    dropped: Counter[str] = Counter()
    tables = []
    for planned in plan.shards:
        commit = done[planned.shard]
        check_file(shards_dir, commit.file, commit.sha256)
        check_file(shards_dir, commit.dropped_file, commit.dropped_sha256)
        if commit.rows + sum(commit.dropped.values()) != planned.stop - planned.start:
            raise DataError(
                f"shard {planned.shard} accounts for {commit.rows} kept and {sum(commit.dropped.values())} "
                f"dropped rows of {planned.stop - planned.start}",
                where=str(shards_dir / commit.file),
            )
        dropped.update(commit.dropped)
        tables.append(_index_rows(shards_dir / commit.file, planned.shard))
    kept = sum(done[r.shard].rows for r in plan.shards)
    if kept == 0:
        raise DataError(
            f"no pair is left of {plan.rows} ({json.dumps(dict(dropped))})", where=str(shards_dir)
        )
    write_table(shards_dir / INDEX, pa.concat_tables(tables))
    manifest = Manifest(
        fingerprint=plan.fingerprint,
        dataset_digest=plan.dataset_digest,
        rows=plan.rows,
        kept=kept,
        dropped=dict(sorted(dropped.items())),
        truncated=sum(done[r.shard].truncated for r in plan.shards),
        tokens=sum(done[r.shard].tokens for r in plan.shards),
        shards=[done[r.shard] for r in plan.shards],
        index_sha256=sha256_file(shards_dir / INDEX),
        tokenizer_sha256=sha256_folder(shards_dir / TOKENIZER),
    )
    write_manifest(shards_dir, manifest)
    return manifest


def _require_present(shards_dir: Path, commit: ShardCommit) -> None:
    """Notice a lost or cut file without reading it; whoever reads it compares its hash."""
    path = shards_dir / commit.file
    size = path.stat().st_size if path.is_file() else None
    if size != commit.bytes:
        raise DataError(
            "the file is missing" if size is None else f"the file has {size} bytes of {commit.bytes}",
            where=str(path),
            why="the manifest names it, so pairs would be missing from training",
            fix="restore the file, or delete the folder and run `dpo-opt precompute` again",
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
