"""The end of scoring: an index and a manifest that name one attempt for every shard."""

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_opt.precompute.shards.commits import committed, is_valid, manifest_commits, remove_if_allowed
from dpo_opt.precompute.shards.read_plan import ranges_of, read_plan
from dpo_opt.precompute.shards.scored_tokenizer import scored_tokenizer_sha256
from dpo_opt.schemas.attempts import AttemptName, commit_names
from dpo_opt.schemas.errors import DataError, FingerprintError, quoted
from dpo_opt.schemas.fingerprint import ALL_FIELDS, refuse_differences
from dpo_opt.schemas.locations import AnyPath, is_file, read_all, remove, sizes
from dpo_opt.schemas.manifest import (
    COMMITS,
    DATA,
    DROPPED,
    INDEX,
    MANIFEST,
    PLAN,
    Manifest,
    Plan,
    ShardCommit,
    damaged,
    load_manifest,
    parse,
    resume_command,
    to_json,
    write_manifest,
)
from dpo_opt.schemas.shard_folder import verified_file
from dpo_opt.schemas.shards import INDEX_GROUP_ROWS, INDEX_SCHEMA, write_table
from dpo_opt.schemas.storage import publish, sha256_file, write_text


def is_finalized(shards_dir: AnyPath, plan: Plan) -> bool:
    """Whether a manifest covers the plan: this fingerprint, this data, these shards.

    While a folder grows, readers follow its earlier manifest, which covers fewer rows than the plan.

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


def require_grown_from(own: Plan, plan: Plan, shards_dir: AnyPath) -> None:
    """Refuse to go on in a folder that is not the one that was scored, or that it has grown to.

    Raises:
        FingerprintError: Its plan does not begin with the own one.
    """
    if plan.fingerprint != own.fingerprint or plan.shards[: len(own.shards)] != own.shards:
        raise FingerprintError(
            f"{PLAN} is of {plan.rows} rows with digest {plan.dataset_digest[:16]}..., this run began with "
            f"{own.rows} rows of digest {own.dataset_digest[:16]}...",
            where=str(shards_dir),
            why="the folder was replaced meanwhile, and other data or another model would be called finished",
            fix="move the folder that this run began with back there, then run the same command again",
        )


def finalize(shards_dir: AnyPath, *, own: Plan | None = None) -> Manifest:
    """Check that the committed shards cover the plan exactly, and write index and manifest.

    Idempotent: a finalized folder keeps its manifest. A folder that has grown keeps the entries of it.

    Args:
        shards_dir: The folder.
        own: The plan that the caller has scored. It is finalized where the folder's plan grew meanwhile and
            other workers have not scored the new rows yet.

    Raises:
        DataError: Shards are missing, a file changed after its commit, no pair was kept, or the tokenizer is
            not the one whose ids were scored.
        FingerprintError: The manifest is not of the plan's first shards, or the plan not of ``own``.
    """
    plan = read_plan(shards_dir)
    if own is not None:
        require_grown_from(own, plan, shards_dir)
    if own is not None and own.rows < plan.rows and len(committed(shards_dir, plan)) < len(plan.shards):
        plan = own
    grown = is_file(shards_dir / MANIFEST)
    if grown and (manifest := _manifest_of_plan(shards_dir, plan)) is not None:
        return manifest
    commits = _require_all_committed(shards_dir, plan)
    # Before the shards, whose hashes take hours where they are many.
    tokenizer_sha256 = scored_tokenizer_sha256(shards_dir, plan.fingerprint)
    index = _verified_index(shards_dir, commits)
    if not len(index):
        dropped = json.dumps(_dropped(commits))
        raise DataError(f"no pair is left of {plan.rows} ({dropped})", where=str(shards_dir))
    # Readers follow the manifest that is there, and its index, until the next manifest is published.
    index_file, index_sha256 = _write_index(
        shards_dir, f"index-{plan.rows}.parquet" if grown else INDEX, index
    )
    manifest = Manifest(
        fingerprint=plan.fingerprint,
        dataset_digest=plan.dataset_digest,
        rows=plan.rows,
        kept=sum(commit.rows for commit in commits),
        dropped=dict(sorted(_dropped(commits).items())),
        truncated=sum(commit.truncated for commit in commits),
        tokens=sum(commit.tokens for commit in commits),
        pairs_per_shard=plan.pairs_per_shard,
        shards=commits,
        index_file=index_file,
        index_sha256=index_sha256,
        tokenizer_sha256=tokenizer_sha256,
    )
    manifest = _publish_one_choice(shards_dir, manifest, plan)
    there = _attempt_files(shards_dir)
    _remove_lost_attempts(shards_dir, load_manifest(shards_dir), there)
    return manifest


def _manifest_of_plan(shards_dir: AnyPath, plan: Plan) -> Manifest | None:
    """The manifest that is there, if it covers the plan; None if it covers the plan's first shards only.

    Raises:
        DataError: A file that it names is missing or cut.
        FingerprintError: It is not of the plan's first shards.
    """
    there = _attempt_files(shards_dir)
    manifest = load_manifest(shards_dir)
    for commit in manifest.shards:
        _require_present(shards_dir, commit, there[DATA])
    if not _covers(manifest, plan):
        require_beginning(manifest, plan, shards_dir)
        return None
    # A `finalize` that was killed after it had published the manifest left these.
    _remove_lost_attempts(shards_dir, manifest, there)
    remove_if_allowed(shards_dir / _choice_name(plan))
    return manifest


def _require_all_committed(shards_dir: AnyPath, plan: Plan) -> list[ShardCommit]:
    """One commit for each shard of the plan, in order.

    Raises:
        DataError: Shards are not scored yet.
    """
    done = committed(shards_dir, plan)
    missing = [planned.shard for planned in plan.shards if planned.shard not in done]
    if missing:
        listed = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise DataError(
            f"{len(missing)} of {len(plan.shards)} shards are not scored yet ({listed})",
            where=str(shards_dir),
            why="pairs would be missing from training",
            fix=resume_command(shards_dir),
        )
    return [done[planned.shard] for planned in plan.shards]


def _verified_index(shards_dir: AnyPath, commits: Sequence[ShardCommit]) -> pa.Table:
    """One row per kept pair (``shards.INDEX_SCHEMA``), after every byte of the commits' files was hashed.

    Raises:
        DataError: A file is missing, or changed after its commit.
    """
    tables = []
    for commit in commits:
        with verified_file(shards_dir, commit.dropped_file, commit.dropped_sha256):
            pass
        with verified_file(shards_dir, commit.file, commit.sha256) as file:
            tables.append(_index_rows(file, commit.shard))
    return pa.concat_tables(tables)


def _dropped(commits: Sequence[ShardCommit]) -> dict[str, int]:
    """Reason to number of rows."""
    dropped: Counter[str] = Counter()
    for commit in commits:
        dropped.update(commit.dropped)
    return dict(dropped)


def _publish_one_choice(shards_dir: AnyPath, manifest: Manifest, plan: Plan) -> Manifest:
    """Publish a manifest, or the one that another ``finalize`` of the same plan chose first.

    Two processes that finalize at once may have seen different attempts at a shard, and each would remove the
    files that its own manifest does not name. So each first tries to create a private file with its choice.
    The file can be created once, and all processes publish the choice that is in it.
    """
    choice = _choice_name(plan)
    while True:
        with contextlib.suppress(FileExistsError):
            write_manifest(shards_dir, manifest, name=choice, replace=False)
        text = read_all(shards_dir, [choice]).get(choice)
        # Looked at last: a second choice can be created only after the first was published and removed.
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
    """Name of a private file, which no reader looks at; the same for all that finalize the same plan."""
    return f".{MANIFEST}.{hashlib.sha256(to_json(plan).encode()).hexdigest()[:8]}.tmp"


def _usable(shards_dir: AnyPath, text: bytes, plan: Plan, *, own: Manifest) -> Manifest | None:
    """A choice, if all its files are there; the files of one that a killed process left may be gone."""
    try:
        chosen = parse(Manifest, text, where=shards_dir)
    except DataError:
        return None
    if chosen == own:
        return own
    data = sizes(shards_dir / DATA)
    ranges = zip(chosen.shards, plan.shards, strict=False)
    records = commit_names(sizes(shards_dir / COMMITS)).values()
    final = manifest_commits(shards_dir)
    whole = _covers(chosen, plan) and all(
        is_valid(c, planned, plan, data) and (c in final or AttemptName(c.shard, c.attempt) in records)
        for c, planned in ranges
    )
    return chosen if whole else None


def _attempt_files(shards_dir: AnyPath) -> dict[str, dict[str, int]]:
    """Folder to names and sizes, for the folders that hold attempts' files; commits first."""
    return {folder: sizes(shards_dir / folder) for folder in (COMMITS, DATA, DROPPED)}


def _remove_lost_attempts(
    shards_dir: AnyPath, manifest: Manifest, there: Mapping[str, Mapping[str, int]]
) -> None:
    """Remove the files of other attempts at the manifest's shards, so that ``data/`` holds each pair once.

    Commits go first, so that no commit is left without its files.

    Args:
        shards_dir: Folder of reference shards.
        manifest: Its manifest.
        there: ``_attempt_files`` from before the manifest was read. So it lists no file that only a later
            manifest names.
    """
    in_manifest = {commit.shard for commit in manifest.shards}
    named = {
        name
        for commit in manifest.shards
        for name in (
            AttemptName(commit.shard, commit.attempt).commit_file,
            commit.file,
            commit.dropped_file,
        )
    }
    for folder, name in ((folder, name) for folder, names in there.items() for name in names):
        attempt = AttemptName.parse(name)
        if attempt is None or not attempt.is_generated or attempt.shard not in in_manifest:
            continue
        if f"{folder}/{name}" not in named:
            remove_if_allowed(shards_dir / folder / name)


def _write_index(shards_dir: AnyPath, name: str, table: pa.Table) -> tuple[str, str]:
    """Publish the index; returns its name and hash.

    Another ``finalize`` may have published an index of other attempts under this name. That one stays, and
    this one gets a name with its hash.
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
    """Notice a lost or cut file by its size, without reading it; readers compare its hash."""
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
