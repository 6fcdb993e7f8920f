"""The end of scoring: an index and a manifest that name one attempt for every shard."""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence

from dpo_opt.precompute.shards.commits import (
    commit_texts,
    committed,
    is_at,
    is_valid,
    manifest_commits,
    read_commit,
    remove_if_allowed,
)
from dpo_opt.precompute.shards.finished import covers, require_all_there
from dpo_opt.precompute.shards.read_plan import ranges_of, read_plan
from dpo_opt.precompute.shards.scored_tokenizer import scored_tokenizer_sha256
from dpo_opt.precompute.shards.write_index import verified_index, write_index
from dpo_opt.schemas.attempts import AttemptName, commit_names
from dpo_opt.schemas.counts import are, counted
from dpo_opt.schemas.errors import DataError, DpoOptError, FingerprintError
from dpo_opt.schemas.fingerprint import ALL_FIELDS, refuse_differences
from dpo_opt.schemas.locations import AnyPath, is_file, read_all, remove, sizes
from dpo_opt.schemas.manifest import (
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
    all_prompts_truncated,
    load_manifest,
    parse,
    resume_command,
    to_json,
    write_manifest,
)
from dpo_opt.schemas.storage import file_names, write_text


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
            f"{MANIFEST} is of {_data(manifest)}, the plan of {_data(plan)}",
            where=str(shards_dir),
            why="finished log-probs would be replaced by those of other data",
            fix=fix,
        )


def _data(record: Plan | Manifest) -> str:
    return f"{counted(record.rows, 'row')} with digest {record.dataset_digest[:16]}..."


def require_grown_from(own: Plan, plan: Plan, shards_dir: AnyPath) -> None:
    """Refuse to go on in a folder that is not the one that was scored, or that it has grown to.

    Raises:
        FingerprintError: Its plan does not begin with the own one.
    """
    if plan.fingerprint != own.fingerprint or plan.shards[: len(own.shards)] != own.shards:
        raise FingerprintError(
            f"{PLAN} is of {_data(plan)}, this run began with {_data(own)}",
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
    index = verified_index(shards_dir, commits)
    if not len(index):
        dropped = json.dumps(_dropped(commits))
        raise DataError(
            f"no {plan.fingerprint.noun} is left of {plan.rows:,} ({dropped})",
            where=str(shards_dir),
            why="there is nothing to train on",
            fix="see the rows in dropped/, correct them or the settings, and pass another --shards",
        )
    # Hashing takes hours where the shards are many: the folder may be another's now.
    require_grown_from(plan, read_plan(shards_dir), shards_dir)
    # Readers follow the manifest that is there, and its index, until the next manifest is published.
    index_file, index_sha256 = write_index(
        shards_dir, f"index-{plan.rows}.parquet" if grown else INDEX, index
    )
    manifest = Manifest(
        fingerprint=plan.fingerprint,
        dataset_digest=plan.dataset_digest,
        rows=plan.rows,
        kept=sum(commit.rows for commit in commits),
        dropped=dict(sorted(_dropped(commits).items())),
        truncated=sum(commit.truncated for commit in commits),
        prompts_truncated=all_prompts_truncated(commits),
        tokens=sum(commit.tokens for commit in commits),
        pairs_per_shard=plan.pairs_per_shard,
        columns=plan.columns,
        shards=commits,
        index_file=index_file,
        index_sha256=index_sha256,
        tokenizer_sha256=tokenizer_sha256,
        tokenizer_files=file_names(shards_dir / TOKENIZER),
    )
    published = _publish_one_choice(shards_dir, manifest, plan)
    if published is None:
        # What is there now is enough, or the error says what is missing.
        return finalize(shards_dir, own=plan)
    there = _attempt_files(shards_dir)
    _remove_lost_attempts(shards_dir, load_manifest(shards_dir), there)
    return published


def _manifest_of_plan(shards_dir: AnyPath, plan: Plan) -> Manifest | None:
    """The manifest that is there, if it covers the plan; None if it covers the plan's first shards only.

    Raises:
        DataError: A file that it names is missing or cut.
        FingerprintError: It is not of the plan's first shards.
    """
    there = _attempt_files(shards_dir)
    manifest = load_manifest(shards_dir)
    require_all_there(shards_dir, manifest)
    if not covers(manifest, plan):
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
            f"{len(missing)} of {counted(len(plan.shards), 'shard')} {are(len(missing))} not scored yet "
            f"({listed})",
            where=str(shards_dir),
            why="pairs would be missing from training",
            fix=resume_command(shards_dir),
        )
    return [done[planned.shard] for planned in plan.shards]


def _dropped(commits: Sequence[ShardCommit]) -> dict[str, int]:
    """Reason to number of rows."""
    dropped: Counter[str] = Counter()
    for commit in commits:
        dropped.update(commit.dropped)
    return dict(dropped)


def _publish_one_choice(shards_dir: AnyPath, manifest: Manifest, plan: Plan) -> Manifest | None:
    """Publish a manifest, or the one that another ``finalize`` of the same plan chose first.

    Two processes that finalize at once may have seen different attempts at a shard, and each would remove the
    files that its own manifest does not name. So each first tries to create a private file with its choice.
    The file can be created once, and all processes publish the choice that is in it.

    Returns:
        The manifest that is there now; None if somebody removed files that the given one names.

    Raises:
        DataError: The folder is gone.
        FingerprintError: It holds something else now.
    """
    choice = _choice_name(plan)
    while True:
        with contextlib.suppress(FileExistsError):
            write_manifest(shards_dir, manifest, name=choice, replace=False)
        text = read_all(shards_dir, [choice]).get(choice)
        # Looked at last: a second choice can be created only after the first was published and removed.
        try:
            there = _overtaken(shards_dir, plan)
        except DpoOptError:
            remove_if_allowed(shards_dir / choice)
            raise
        if there is not None:
            remove(shards_dir / choice)
            return there
        chosen = None if text is None else _usable(shards_dir, text, plan)
        if text is not None and chosen is not None:
            write_text(shards_dir / MANIFEST, text.decode("utf-8"))
        if text is not None:
            remove(shards_dir / choice)
        if chosen is not None or not _is_whole(shards_dir, manifest, plan):
            return chosen


def _choice_name(plan: Plan) -> str:
    """Name of a private file, which no reader looks at; the same for all that finalize the same plan."""
    return f".{MANIFEST}.{hashlib.sha256(to_json(plan).encode()).hexdigest()[:8]}.tmp"


def _overtaken(shards_dir: AnyPath, plan: Plan) -> Manifest | None:
    """The manifest that another ``finalize`` published meanwhile for the plan's rows, and perhaps for more.

    Raises:
        DataError: The folder is gone.
        FingerprintError: Its plan or its manifest is of something else now.
    """
    require_grown_from(plan, read_plan(shards_dir), shards_dir)
    if not is_file(shards_dir / MANIFEST):
        return None
    manifest = load_manifest(shards_dir)
    if manifest.fingerprint == plan.fingerprint and ranges_of(manifest)[: len(plan.shards)] == plan.shards:
        return manifest
    require_beginning(manifest, plan, shards_dir)
    return None


def _usable(shards_dir: AnyPath, text: bytes, plan: Plan) -> Manifest | None:
    """A choice, if all its files are there; the files of one that a killed process left may be gone."""
    try:
        chosen = parse(Manifest, text, where=shards_dir)
    except DataError:
        return None
    return chosen if _is_whole(shards_dir, chosen, plan) else None


def _is_whole(shards_dir: AnyPath, manifest: Manifest, plan: Plan) -> bool:
    """Whether the attempts of a manifest that is not published yet still count, and its index is there.

    A choice that a killed process left may be older than an index that somebody removed.
    """
    data = sizes(shards_dir / DATA)
    records = commit_names(sizes(shards_dir / COMMITS)).values()
    final = manifest_commits(shards_dir)
    whole = covers(manifest, plan) and manifest.index_file in sizes(shards_dir)
    return whole and all(
        is_valid(c, planned, plan, data) and (c in final or AttemptName(c.shard, c.attempt) in records)
        for c, planned in zip(manifest.shards, plan.shards, strict=True)
    )


def _attempt_files(shards_dir: AnyPath) -> dict[str, dict[str, int]]:
    """Folder to names and sizes, for the folders that hold attempts' files; commits first."""
    return {folder: sizes(shards_dir / folder) for folder in (COMMITS, DATA, DROPPED)}


def _remove_lost_attempts(
    shards_dir: AnyPath, manifest: Manifest, there: Mapping[str, Mapping[str, int]]
) -> None:
    """Remove the files of other attempts at the manifest's shards, so that ``data/`` holds each pair once.

    Commits go first, so that no commit is left without its files. An attempt stays whose commit is of other
    rows or another model: somebody else's, who took this folder for another.

    Args:
        shards_dir: Folder of reference shards.
        manifest: Its manifest.
        there: ``_attempt_files`` from before the manifest was read. So it lists no file that only a later
            manifest names.
    """
    final = {commit.shard: commit for commit in manifest.shards}
    named = {
        name
        for commit in manifest.shards
        for name in (
            AttemptName(commit.shard, commit.attempt).commit_file,
            commit.file,
            commit.dropped_file,
        )
    }
    lost = {
        f"{folder}/{name}": attempt
        for folder, names in there.items()
        for name in names
        if (attempt := AttemptName.parse(name)) is not None
        and attempt.is_generated
        and attempt.shard in final
        and f"{folder}/{name}" not in named
    }
    records = commit_names(name for name in there[COMMITS] if f"{COMMITS}/{name}" in lost)
    foreign = {
        records[name]
        for name, text in commit_texts(shards_dir, list(records)).items()
        if (commit := read_commit(text)) is not None
        and not is_at(commit, final[records[name].shard], manifest.fingerprint)
    }
    for file, attempt in lost.items():
        if attempt not in foreign:
            remove_if_allowed(shards_dir / file)
