"""Damaged and lost files of a folder, healed: what cannot be trusted is scored again, and nothing else is.

A shard whose files are not those that its record states loses the record, and is then one that nobody has
scored yet. What follows from other records is made again from them: a manifest and an index from the commits,
commits and a plan from the manifest, a plan from the data, the tokenizer from the model. A repair that is
killed is finished by the next.
"""

import contextlib
import re
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.shards.commits import is_of, read_commit
from dpo_opt.precompute.shards.finalize import finalize, require_beginning
from dpo_opt.precompute.shards.plan import make_plan, plan_of, read_plan
from dpo_opt.precompute.shards.reference import make_tokenizer, resolve_reference
from dpo_opt.precompute.shards.write_plan import write_tokenizer
from dpo_opt.precompute.tokens.tokenize import load_tokenizer
from dpo_opt.schemas.attempts import AttemptName, commit_names
from dpo_opt.schemas.errors import ConfigError, DataError, FingerprintError, quoted
from dpo_opt.schemas.fingerprint import ALL_FIELDS, follows, refuse_differences
from dpo_opt.schemas.locations import AnyPath, inside, is_file, on_this_machine, read_all, remove, sizes
from dpo_opt.schemas.manifest import (
    COMMAND,
    COMMITS,
    DAMAGED,
    DATA,
    MANIFEST,
    PLAN,
    TOKENIZER,
    Manifest,
    Plan,
    ShardCommit,
    load_manifest,
    parse,
    resume_command,
    to_json,
)
from dpo_opt.schemas.models import find_model, tokenizer_digest
from dpo_opt.schemas.pairs import Numerics
from dpo_opt.schemas.progress import Progress, Silent
from dpo_opt.schemas.shard_folder import ShardFolder, verified_file
from dpo_opt.schemas.storage import file_names, write_text

_PLAN = re.compile(r"plan(-(?P<number>\d+))?\.json")


class Repair(BaseModel):
    """What a folder needs, or what was done for it."""

    damaged: list[str]
    """What is not as it was written, each with its place."""
    rebuilt: list[str]
    """Records that are made again from others, relative to the folder."""
    shards_to_score: list[int]
    """Shards without a commit: those that lost theirs here, and those that nobody has scored yet."""
    finalized: bool
    """Whether readers may use the folder now."""
    next: str | None
    """The command that scores those shards and finalizes; None where there is nothing to score."""


class _Plans(NamedTuple):
    """What was to be scored, as far as it is known."""

    known: list[Plan]
    """In order; the last one counts."""
    files: dict[str, str]
    """Files that must be written for them."""
    unwanted: list[str]
    """Files that stand for none of them."""
    lost_growth: bool
    """The folder was to grow, and nothing says to what."""


def repair(shards_dir: AnyPath, *, dry_run: bool = False, progress: Progress | None = None) -> Repair:
    """Take out of the way what is damaged, and make again what follows from the rest.

    Reads every file that a record names. A folder that is whole is left as it is.

    Args:
        shards_dir: Folder of reference shards, finalized or not; workers may be at it.
        dry_run: Only say what would be done.
        progress: Told of every shard that was looked at.

    Raises:
        ConfigError: The model of the settings is needed, and is not there.
        DataError: The folder holds no shards, a name leaves it, or nothing says any more what it held.
        FingerprintError: Plan and manifest, or the data or model and what was scored, do not belong together.
        DpoOptError: The store does not answer, or refuses.
    """
    damaged: list[str] = []
    manifest = _manifest(shards_dir, damaged)
    plans = _plans(shards_dir, manifest, damaged)
    plan = plans.known[-1]
    if manifest is not None:
        require_beginning(manifest, plan, shards_dir)
    names = commit_names(sizes(shards_dir / COMMITS))
    records = read_all(shards_dir / COMMITS, list(names))
    commits = {names[name]: read_commit(text) for name, text in records.items()}
    unreadable = [attempt.commit_file for attempt, commit in commits.items() if commit is None]
    damaged += [f"{quoted(shards_dir / name)}: not readable as a commit" for name in unreadable]
    final = {} if manifest is None else {commit.shard: commit for commit in manifest.shards}
    unwanted = [*plans.unwanted, *unreadable]
    good = _whole_shards(shards_dir, plan, final, commits, damaged, unwanted, progress or Silent())
    left = [planned.shard for planned in plan.shards if planned.shard not in good]
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
    if problem := _tokenizer_problem(shards_dir, plan, manifest):
        damaged.append(problem)
        tokenizer = _tokenizer_of_model(shards_dir, plan)
        # Saved by another version it may be other files of the same tokenizer.
        replaced = manifest is not None or replaced
    if replaced:
        unwanted += _losers(final, good, names.values())
    whole = not left and not plans.lost_growth
    finalizes = whole and (replaced or manifest is None)
    texts = plans.files | _lost_commits(final, good, commits, replaced=replaced)
    if not dry_run:
        if tokenizer is not None:
            _replace_tokenizer(shards_dir, tokenizer)
        # First what is taken from the manifest, which goes last.
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


def _said(error: DataError) -> str:
    """What is damaged, on one line whatever the folder is called."""
    return f"{quoted(error.where)}: {error.what}"


def _manifest(shards_dir: AnyPath, damaged: list[str]) -> Manifest | None:
    """None where there is none that can be trusted.

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
        damaged.append(_said(error))
        return None


def _plans(shards_dir: AnyPath, manifest: Manifest | None, damaged: list[str]) -> _Plans:
    """The plans that can be read, what the manifest covers, or else what the data gives.

    Raises:
        ConfigError, DataError, FingerprintError: As ``repair``.
    """
    numbers = {name: int(m["number"] or 0) for name in sizes(shards_dir) if (m := _PLAN.fullmatch(name))}
    texts = read_all(shards_dir, sorted(numbers, key=lambda name: numbers[name]))
    known: list[Plan] = []
    spelled: list[str] = []  # of another version they say less or more, and stay as they are
    last_is_lost = False
    for name, text in texts.items():
        try:
            known.append(parse(Plan, text, where=shards_dir / name))
            spelled.append(text.decode("utf-8"))
            last_is_lost = False
        except DataError as error:
            damaged.append(_said(error))
            last_is_lost = True
    if manifest is not None and (not known or known[-1].rows < manifest.rows):
        known.append(plan_of(manifest))
        spelled.append(to_json(known[-1]))
    lost_growth = last_is_lost and bool(known) and max(numbers.values()) >= len(known)
    if not known:
        known.append(_plan_from_data(shards_dir))
        spelled.append(to_json(known[-1]))
    wanted = {f"plan-{i}.json" if i else PLAN: text for i, text in enumerate(spelled)}
    files = {name: text for name, text in wanted.items() if texts.get(name) != text.encode()}
    return _Plans(known, files, [name for name in texts if name not in wanted], lost_growth)


def _plan_from_data(shards_dir: AnyPath) -> Plan:
    """The plan that the folder's commits are of, made as its first run made it.

    Raises:
        ConfigError: The model of the settings is not there.
        DataError: There are no commits or no settings, or the data is not there.
        FingerprintError: What is there now is not what was scored.
    """
    names = list(commit_names(sizes(shards_dir / COMMITS)))
    commits = list(filter(None, map(read_commit, read_all(shards_dir / COMMITS, names).values())))
    if not commits and not is_file(shards_dir / PLAN):
        read_plan(shards_dir)  # says that this is no folder of shards
    if not commits:
        raise DataError(
            "the plan cannot be read, and nothing is scored yet",
            where=str(shards_dir / PLAN),
            why="nothing says what the folder was to hold",
            fix=f"rm -r {quoted(shards_dir)}, then run the precompute command again",
        )
    scored = commits[0].fingerprint
    settings = _settings(shards_dir, lost=PLAN)
    with tempfile.TemporaryDirectory(prefix="dpo-opt-") as elsewhere:
        # A folder without a plan: the one that is damaged would be asked first.
        config = PrecomputeConfig.model_validate(settings | {"shards": elsewhere})
        reference = resolve_reference(config)
        tokenizer = make_tokenizer(config, reference).on(scored.template_date)
        numerics = Numerics(**{name: getattr(scored, name) for name in Numerics._fields})
        plan = make_plan(config, reference=reference, tokenizer=tokenizer, numerics=numerics).plan
    fix = f"restore {PLAN}, or the data and the model that {COMMAND} names"
    if not follows(scored, plan.fingerprint):
        refuse_differences(
            cached=scored, current=plan.fingerprint, fields=ALL_FIELDS, where=str(shards_dir), fix=fix
        )
    plan = plan.model_copy(update={"fingerprint": scored})
    by_shard = {planned.shard: planned for planned in plan.shards}
    foreign = [c for c in commits if c.shard not in by_shard or not is_of(c, by_shard[c.shard], plan)]
    if foreign:
        raise DataError(
            f"the plan is lost, and shard {foreign[0].shard} is not one of the data that is there now",
            where=str(shards_dir),
            why="a plan of this data would not be that of what was scored",
            fix=fix,
        )
    return plan


def _settings(shards_dir: AnyPath, *, lost: str) -> dict[str, Any]:
    """What the folder's latest run was told.

    Raises:
        DataError: Nothing says it.
    """
    try:
        settings = yaml.safe_load(read_all(shards_dir, [COMMAND]).get(COMMAND, b""))
    except (yaml.YAMLError, UnicodeDecodeError):
        settings = None
    if not isinstance(settings, dict):
        raise DataError(
            f"{lost} is lost or damaged, and there is no {COMMAND} to make it again by",
            where=str(shards_dir),
            why="nothing else says which data and which model were scored",
            fix=f"restore {lost} from where the folder was copied, or pass another --shards folder",
        )
    return settings


def _tokenizer_problem(shards_dir: AnyPath, plan: Plan, manifest: Manifest | None) -> str | None:
    """By the manifest's hash; else by loading it, because ``finalize`` takes the hash of what it finds."""
    folder = shards_dir / TOKENIZER
    try:
        if manifest is not None:
            with ShardFolder(shards_dir, manifest).tokenizer():
                return None
        with on_this_machine(folder) as local:
            if tokenizer_digest(load_tokenizer(local)) == plan.fingerprint.tokenizer:
                return None
        return f"{quoted(folder)}: it is not the tokenizer whose ids were scored"
    except DataError as error:
        if error.kind != DAMAGED:
            raise
        return _said(error)
    except (ConfigError, FileNotFoundError):
        return f"{quoted(folder)}: no tokenizer can be read from it"


def _tokenizer_of_model(shards_dir: AnyPath, plan: Plan) -> Any:
    """The tokenizer of the model that was scored.

    Raises:
        ConfigError, DataError: It is not there.
        FingerprintError: It is another one.
    """
    model = find_model(_settings(shards_dir, lost=f"{TOKENIZER}/")["model"])
    tokenizer = load_tokenizer(model)
    if tokenizer_digest(tokenizer) != plan.fingerprint.tokenizer:
        raise FingerprintError(
            "the model's tokenizer is not the one whose ids were scored",
            where=str(model),
            why=f"it was to replace the damaged files of {TOKENIZER}/",
            fix=f"restore {TOKENIZER}/ from where the folder was copied, or the model that {COMMAND} names",
        )
    return tokenizer


def _replace_tokenizer(shards_dir: AnyPath, tokenizer: Any) -> None:
    """What is there stays until the new files are whole: a folder keeps one or the other."""
    folder = shards_dir / TOKENIZER
    if not isinstance(folder, Path):
        for name in file_names(folder):
            remove(folder / name)
        write_tokenizer(shards_dir, tokenizer)
        return
    # A private name: a repair that is killed here leaves nothing that is taken for a tokenizer.
    aside = folder.with_name(f".{TOKENIZER}.{secrets.token_hex(4)}.tmp")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(aside)
    try:
        write_tokenizer(shards_dir, tokenizer)
    finally:
        with contextlib.suppress(FileNotFoundError):
            if not folder.exists():
                aside.rename(folder)
            elif aside.is_dir() and not aside.is_symlink():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.unlink()


def _whole_shards(
    shards_dir: AnyPath,
    plan: Plan,
    final: Mapping[int, ShardCommit],
    commits: Mapping[AttemptName, ShardCommit | None],
    damaged: list[str],
    unwanted: list[str],
    progress: Progress,
) -> dict[int, ShardCommit]:
    """One commit for each shard whose files are as it states: the manifest's own, else the smallest id."""
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
    """What is wrong with a file; None where its bytes are as recorded.

    Raises:
        DataError: The name leaves the folder, or the file is a link that does.
    """
    try:
        with verified_file(shards_dir, name, sha256):
            return None
    except DataError as error:
        if error.kind != DAMAGED:
            raise
        return _said(error)


def _require_other_records(
    shards_dir: AnyPath, left: Sequence[int], attempts: Collection[AttemptName]
) -> None:
    """Whether a damaged manifest may go: every shard that was scored has a commit of its own, whole or not.

    Raises:
        DataError: Some have none.
    """
    recorded = {attempt.shard for attempt in attempts}
    scored = {attempt.shard for attempt in map(AttemptName.parse, sizes(shards_dir / DATA)) if attempt}
    only_there = [shard for shard in left if shard in scored - recorded]
    if only_there:
        raise DataError(
            f"the manifest is damaged, and {len(only_there)} scored shards have no commit",
            where=str(shards_dir / MANIFEST),
            why="nothing else says which files are theirs, so they would be scored again",
            fix=f"restore {MANIFEST} from where the folder was copied, or remove it to score them again",
        )


def _losers(
    final: Mapping[int, ShardCommit], good: Mapping[int, ShardCommit], attempts: Collection[AttemptName]
) -> Iterator[str]:
    """Records that would win over what a manifest named, were it gone."""
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
    """Records that only the manifest holds: all of them where it goes, else those that cannot be read."""
    found = {}
    for shard, commit in final.items():
        attempt = AttemptName(commit.shard, commit.attempt)
        there = commits.get(attempt, None if replaced else commit)
        is_lost = there != commit if replaced else there is None
        if good.get(shard) == commit and is_lost:
            found[attempt.commit_file] = to_json(commit)
    return found
