"""What is unusual about a folder of shards: files that nobody looks at, a plan that is gone."""

import re
from collections.abc import Iterator
from pathlib import Path

from dpo_opt.precompute.shards.gc import (
    columns_in_use,
    is_claim,
    is_index,
    is_private,
    is_spent_claim,
    wanted,
)
from dpo_opt.precompute.shards.read_plan import plan_of, read_plans
from dpo_opt.precompute.shards.refused_plan import REFUSED
from dpo_opt.precompute.shards.weights_memo import WEIGHTS
from dpo_opt.schemas.attempts import AttemptName
from dpo_opt.schemas.errors import DataError, quoted
from dpo_opt.schemas.locations import AnyPath, stored_files
from dpo_opt.schemas.manifest import (
    COMMAND,
    COMMITS,
    DATA,
    DROPPED,
    MANIFEST,
    PLAN,
    TOKENIZER,
    Manifest,
    Plan,
    resume_command,
)
from dpo_opt.schemas.sidecars import COLUMNS, is_planned_file
from dpo_opt.schemas.storage import files_below

VERDICT = "verify.json"
"""What the last verification found; read by people, compared by nobody."""

_MOST_LISTED = 20

_EXPECTED = re.compile(
    rf"{MANIFEST}|{PLAN}|{COMMAND}|model_config\.json|{VERDICT}|{WEIGHTS}|plan-\d+\.json|{TOKENIZER}/.+|slurm/.+"
    rf"|{COLUMNS}/[^/]+\.parquet|{re.escape(REFUSED)}"
)


def folder_notes(shards: AnyPath, manifest: Manifest) -> list[str]:
    """Everything that is there and should not be, or is not and could; none of it reaches a reader."""
    return [
        *_plan_notes(shards, manifest),
        *_extra_files(shards, manifest),
    ]


def planned_rows(shards: AnyPath, manifest: Manifest) -> int:
    """Source rows that the folder knows of: more than the manifest's while it grows."""
    return max(manifest.rows, *(plan.rows for plan in _readable_plans(shards)), 0)


def _readable_plans(shards: AnyPath) -> list[Plan]:
    try:
        return read_plans(shards)
    except DataError:
        return []  # readers do not need them


def _plan_notes(shards: AnyPath, manifest: Manifest) -> Iterator[str]:
    needed = "readers do not need it, `dpo-opt status` and `precompute` do"
    try:
        plans = read_plans(shards)
    except DataError as error:
        yield f"{error.where}: {error.what}; {needed}"
        return
    if not plans:
        yield f"{shards / PLAN} is missing; {needed}"
    elif plans[-1].rows > manifest.rows:
        yield (
            f"the folder is growing to {plans[-1].rows:,} rows: "
            f"`{resume_command(shards)}` goes on, "
            f"`dpo-opt finalize --shards {quoted(shards)}` ends it"
        )
    if plans and plan_of(manifest) not in plans:
        yield f"{shards / PLAN} is that of another run: `dpo-opt precompute` would not go on with this folder"


def _extra_files(shards: AnyPath, manifest: Manifest) -> Iterator[str]:
    named = {name for commit in manifest.shards for name in (commit.file, commit.dropped_file)}
    named.add(manifest.index_file)
    plans = _readable_plans(shards)
    columns, kept = columns_in_use(plans, manifest), _kept_by_gc(shards, plans, manifest)
    there = _files(shards)
    unread = {n for n in there if is_planned_file(n)}
    others = sorted(
        n for n in there - named - columns if is_private(n) or n in unread or not _EXPECTED.fullmatch(n)
    )
    growing = planned_rows(shards, manifest) > manifest.rows
    gc = f"`dpo-opt gc --shards {quoted(shards)}`"
    left = f"left by other attempts ({gc})"
    indexes = f"indexes of earlier manifests, for readers that opened the folder then ({gc})"
    awaited = "indexes that `dpo-opt finalize` may use"
    unplanned = (
        "scored for rows that no plan and no manifest here has (`dpo-opt gc` keeps them, because their plan "
        "may be lost: restore it, or remove them)"
    )
    claims = "claim of a run that is planning, or that was killed at it and goes on by the same command"
    unknown = "named by nothing here, and read by nobody"
    kinds = (left, unplanned, indexes, awaited, claims, unknown)
    found: dict[str, list[str]] = {kind: [] for kind in kinds}
    for name in others:
        folder, _, file = name.rpartition("/")
        attempt = AttemptName.parse(file) if folder in (COMMITS, DATA, DROPPED) else None
        if attempt is not None and folder == COMMITS:
            continue
        generated = attempt is not None and attempt.is_generated
        if attempt is not None and generated and growing and attempt.shard >= len(manifest.shards):
            continue  # of the part that is not finalized yet
        if name in kept:
            kind = unplanned if generated else awaited
        elif generated or is_private(name) or is_planned_file(name) or is_spent_claim(name, there):
            kind = left
        elif is_index(name):
            kind = indexes
        else:
            kind = claims if is_claim(name) else unknown
        found[kind].append(name)
    for kind, names in found.items():
        if names:
            yield f"{kind}: {listed(names)}"


def _files(shards: AnyPath) -> set[str]:
    if not isinstance(shards, Path):
        return set(stored_files(shards))
    return {path.relative_to(shards).as_posix() for path in files_below(shards) if path.is_file()}


def _kept_by_gc(shards: AnyPath, plans: list[Plan], manifest: Manifest) -> set[str]:
    try:
        return wanted(shards, plans, manifest)
    except DataError:
        return set()  # a commit that nobody reads is a link out of the folder


def listed(names: list[str]) -> str:
    """Names of files on one line: the first ones, and how many more there are."""
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(map(quoted, names[:_MOST_LISTED])) + more
