"""``dpo-opt repair``: heals the damaged and lost files of a folder. Only damaged shards are scored again.

If a shard's files are not those that its commit states, the commit is removed, and the shard counts as not
scored. Other files are made again: a manifest and an index from the commits, commits and a plan from the
manifest, a plan from the data, the tokenizer from the model. If a repair is killed, the next one finishes it.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence

from pydantic import BaseModel

from dpo_opt.precompute.shards.commits import commit_texts, is_of, record_of
from dpo_opt.precompute.shards.finalize import finalize, require_beginning
from dpo_opt.precompute.shards.planned_columns import write_columns
from dpo_opt.precompute.shards.recover_plan import in_one_line, recover_plans
from dpo_opt.precompute.shards.recover_tokenizer import (
    replace_tokenizer,
    tokenizer_of_model,
    tokenizer_problem,
)
from dpo_opt.precompute.tokens.tokenize import TEXT_TO_IDS
from dpo_opt.schemas.attempts import AttemptName, commit_names
from dpo_opt.schemas.counts import counted
from dpo_opt.schemas.errors import DataError, FingerprintError, quoted
from dpo_opt.schemas.locations import AnyPath, inside, is_file, remove, sizes
from dpo_opt.schemas.manifest import (
    COMMITS,
    DAMAGED,
    DATA,
    MANIFEST,
    TOKENIZER,
    Manifest,
    Plan,
    ShardCommit,
    load_manifest,
    resume_command,
    to_json,
)
from dpo_opt.schemas.progress import Progress, Silent
from dpo_opt.schemas.shard_folder import verified_file
from dpo_opt.schemas.storage import write_text


class Repair(BaseModel):
    """What a folder needs, or what was done for it."""

    damaged: list[str]
    """Files that are not as they were written, each with what is wrong."""
    rebuilt: list[str]
    """Records that are made again from others, relative to the folder."""
    shards_to_score: list[int]
    """Shards without a commit: those that lost it here, and those that were not scored yet."""
    finalized: bool
    """Whether readers may use the folder now."""
    next: str | None
    """The command that scores those shards and finalizes; None where there is nothing to score."""


def repair(shards_dir: AnyPath, *, dry_run: bool = False, progress: Progress | None = None) -> Repair:
    """Remove what is damaged, and make again what follows from the rest.

    Reads every file that a record names. A folder that is whole is left as it is.

    Args:
        shards_dir: Folder of reference shards, finalized or not; workers may be running.
        dry_run: Only say what would be done.
        progress: Told of every shard that was looked at.

    Raises:
        ConfigError: The model of the settings is needed, and is not there.
        DataError: The folder holds no shards, a file's name leads out of it, or nothing says what it held.
        FingerprintError: Plan and manifest, or the data or model and what was scored, do not belong together.
        DpoOptError: The store does not answer, or refuses.
    """
    damaged: list[str] = []
    manifest = _manifest(shards_dir, damaged)
    plans = recover_plans(shards_dir, manifest, damaged)
    plan = plans.known[-1]
    if manifest is not None:
        require_beginning(manifest, plan, shards_dir)
    names = commit_names(sizes(shards_dir / COMMITS))
    records = commit_texts(shards_dir, list(names))
    commits = {names[name]: record_of(names[name], text) for name, text in records.items()}
    unreadable = [attempt.commit_file for attempt, commit in commits.items() if commit is None]
    damaged += [f"{quoted(shards_dir / name)}: not readable as a commit" for name in unreadable]
    final = {} if manifest is None else {commit.shard: commit for commit in manifest.shards}
    unwanted = [*plans.unwanted, *unreadable]
    good = _whole_shards(shards_dir, plan, final, commits, damaged, unwanted, progress or Silent())
    left = [planned.shard for planned in plan.shards if planned.shard not in good]
    if damaged and left:
        _require_own_version(shards_dir, plan)
    replaced = manifest is None and is_file(shards_dir / MANIFEST)
    if replaced:
        _require_other_records(shards_dir, left, names.values())
    if manifest is not None:
        replaced = any(good.get(shard) != commit for shard, commit in final.items())
        if problem := _problem(shards_dir, manifest.index_file, manifest.index_sha256):
            damaged.append(problem)
            unwanted.append(manifest.index_file)
            replaced = True
    tokenizer = None
    if problem := tokenizer_problem(shards_dir, plan, manifest):
        damaged.append(problem)
        tokenizer = tokenizer_of_model(shards_dir, plan)
        # The same tokenizer may stand in other files there than those that are lost.
        replaced = manifest is not None or replaced
    if replaced:
        unwanted += _losers(final, good, names.values())
    whole = not left and not plans.lost_growth
    finalizes = whole and (replaced or manifest is None)
    texts = plans.files | _lost_commits(final, good, commits, replaced=replaced)
    if not dry_run:
        if tokenizer is not None:
            replace_tokenizer(shards_dir, tokenizer)
        write_columns(shards_dir, plans.columns, plan)
        # Commits that only the manifest holds are written first, and the manifest is removed last.
        for name, text in texts.items():
            write_text(inside(shards_dir, name), text)
        for name in [*unwanted, *([MANIFEST] if replaced else [])]:
            if name not in texts:
                remove(inside(shards_dir, name))
        if finalizes:
            finalize(shards_dir)
    return Repair(
        damaged=damaged,
        rebuilt=[
            *sorted(texts),
            *([f"{TOKENIZER}/"] if tokenizer is not None else []),
            *([MANIFEST] if finalizes else []),
        ],
        shards_to_score=left,
        finalized=not dry_run if finalizes else manifest is not None and not replaced,
        next=None if whole else resume_command(shards_dir) + (" --append" if plans.lost_growth else ""),
    )


def _require_own_version(shards_dir: AnyPath, plan: Plan) -> None:
    """Check that this version could score a shard again, before a record of it is removed.

    Raises:
        FingerprintError: It makes other ids of a text than those that were scored.
    """
    if plan.fingerprint.text_to_ids != TEXT_TO_IDS:
        raise FingerprintError(
            "another version of dpo-opt scored the folder, and this one would make other ids of its texts",
            where=str(shards_dir),
            why="shards that it scores again would not belong to the others",
            fix="restore the files from where the folder was copied, or repair it with that version",
        )


def _manifest(shards_dir: AnyPath, damaged: list[str]) -> Manifest | None:
    """The manifest; None if there is none, or if it is damaged.

    Raises:
        DataError: It is of a later version, or no file of the folder could be meant by it.
    """
    if not is_file(shards_dir / MANIFEST):
        return None
    try:
        return load_manifest(shards_dir)
    except DataError as error:
        if error.kind != DAMAGED:
            raise
        damaged.append(in_one_line(error))
        return None


def _whole_shards(
    shards_dir: AnyPath,
    plan: Plan,
    final: Mapping[int, ShardCommit],
    commits: Mapping[AttemptName, ShardCommit | None],
    damaged: list[str],
    unwanted: list[str],
    progress: Progress,
) -> dict[int, ShardCommit]:
    """One commit for each shard that is whole: the manifest's own, else that with the smallest id."""
    by_shard = {
        shard: [(AttemptName(shard, commit.attempt).commit_file, commit)] for shard, commit in final.items()
    }
    for attempt, commit in commits.items():
        if commit is not None:
            by_shard.setdefault(attempt.shard, []).append((attempt.commit_file, commit))
    good: dict[int, ShardCommit] = {}
    progress.start("checking", total=len(plan.shards), unit="shards")
    for planned in plan.shards:
        for name, commit in by_shard.get(planned.shard, []):
            if not is_of(commit, planned, plan):
                continue
            problems = list(_problems(shards_dir, commit))
            if not problems:
                good[planned.shard] = commit
                break
            damaged += [problem for problem in problems if problem not in damaged]
            unwanted.append(name)
        progress.advance(1)
    progress.finish()
    return good


def _problems(shards_dir: AnyPath, commit: ShardCommit) -> Iterator[str]:
    for name, sha256 in ((commit.file, commit.sha256), (commit.dropped_file, commit.dropped_sha256)):
        if problem := _problem(shards_dir, name, sha256):
            yield f"{problem} (shard {commit.shard})"


def _problem(shards_dir: AnyPath, name: str, sha256: str) -> str | None:
    """What is wrong with a file; None if its bytes are as recorded.

    Raises:
        DataError: The name leaves the folder, or the file is a link that does.
    """
    try:
        with verified_file(shards_dir, name, sha256):
            return None
    except DataError as error:
        if error.kind != DAMAGED:
            raise
        return in_one_line(error)


def _require_other_records(
    shards_dir: AnyPath, left: Sequence[int], attempts: Collection[AttemptName]
) -> None:
    """Check that a damaged manifest may be removed: every shard that was scored also has a commit.

    Raises:
        DataError: Some have none.
    """
    recorded = {attempt.shard for attempt in attempts}
    scored = {attempt.shard for attempt in map(AttemptName.parse, sizes(shards_dir / DATA)) if attempt}
    only_there = [shard for shard in left if shard in scored - recorded]
    if only_there:
        raise DataError(
            f"the manifest is damaged, and {counted(len(only_there), 'scored shard')} without a commit",
            where=str(shards_dir / MANIFEST),
            why="nothing else says which files are theirs, so they would be scored again",
            fix=f"restore {MANIFEST} from where the folder was copied, or remove it to score them again",
        )


def _losers(
    final: Mapping[int, ShardCommit], good: Mapping[int, ShardCommit], attempts: Collection[AttemptName]
) -> Iterator[str]:
    """Commits that would count instead of the manifest's, if the manifest were gone."""
    for attempt in attempts:
        commit = final.get(attempt.shard)
        if commit is not None and good.get(commit.shard) == commit and attempt.id < commit.attempt:
            yield attempt.commit_file


def _lost_commits(
    final: Mapping[int, ShardCommit],
    good: Mapping[int, ShardCommit],
    commits: Mapping[AttemptName, ShardCommit | None],
    *,
    replaced: bool,
) -> dict[str, str]:
    """Commits that only the manifest holds: all of them if it is replaced, else those that are unreadable."""
    found = {}
    for shard, commit in final.items():
        attempt = AttemptName(commit.shard, commit.attempt)
        there = commits.get(attempt, None if replaced else commit)
        is_lost = there != commit if replaced else there is None
        if good.get(shard) == commit and is_lost:
            found[attempt.commit_file] = to_json(commit)
    return found
