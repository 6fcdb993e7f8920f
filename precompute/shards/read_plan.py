"""The plans of a folder: the first, and one more for each time the folder grew. The last one counts."""

import itertools
import re

from dpo_opt.schemas.errors import DataError, quoted
from dpo_opt.schemas.locations import AnyPath, is_file, read_all, sizes
from dpo_opt.schemas.manifest import (
    COMMITS,
    MANIFEST,
    PLAN,
    Manifest,
    Plan,
    ShardRange,
    load_manifest,
    no_shards,
    parse,
    repair_command,
)

PLAN_NAME = re.compile(r"plan(-(?P<number>[1-9]\d*))?\.json")


def plan_name(number: int) -> str:
    """The file of a plan: 0 for the first, then one more for each time the folder grew."""
    return f"plan-{number}.json" if number else PLAN


def known_plans(shards_dir: AnyPath) -> list[Plan]:
    """The folder's plans, and that of its manifest where it is lost, as in a copy for readers.

    Raises:
        DataError: A plan or the manifest is damaged.
    """
    plans = read_plans(shards_dir)
    if not is_file(shards_dir / MANIFEST):
        return plans
    return with_covered_plan(plans, load_manifest(shards_dir), shards_dir)


def with_covered_plan(plans: list[Plan], manifest: Manifest, shards_dir: AnyPath) -> list[Plan]:
    """Plans, and that of the manifest where it has more rows than they.

    Raises:
        DataError: The shards of the manifest do not add up.
    """
    if plans and plans[-1].rows >= manifest.rows:
        return plans
    covered, place = plan_of(manifest), shards_dir / MANIFEST
    require_whole(covered, where=place, fix=f"rm {quoted(place)}, then {repair_command(shards_dir)}")
    return [*plans, covered]


def plan_of(manifest: Manifest) -> Plan:
    """The plan that a manifest covers."""
    return Plan(
        fingerprint=manifest.fingerprint,
        dataset_digest=manifest.dataset_digest,
        rows=manifest.rows,
        pairs_per_shard=manifest.pairs_per_shard,
        columns=manifest.columns,
        shards=ranges_of(manifest),
    )


def ranges_of(manifest: Manifest) -> list[ShardRange]:
    """The shards that a manifest covers, as a plan states them."""
    return [
        ShardRange.model_validate({name: getattr(c, name) for name in ShardRange.model_fields})
        for c in manifest.shards
    ]


def read_plans(shards_dir: AnyPath) -> list[Plan]:
    """The folder's plans, one for each time it grew; each holds the shards of the one before.

    Raises:
        DataError: One of them is damaged, or lost while a later one is there.
    """
    names = sizes(shards_dir)
    found = list(itertools.takewhile(names.__contains__, map(plan_name, itertools.count())))
    later = sorted(name for name in names if PLAN_NAME.fullmatch(name) and name not in found)
    # A plan is written after the one before it, but a listing that is made meanwhile may miss the first.
    if later and not is_file(shards_dir / (lost := plan_name(len(found)))):
        raise DataError(
            f"there is no {lost}, but {later[0]}",
            where=str(shards_dir),
            why="a later plan counts only after those before it, so its shards would not be seen",
            fix=repair_command(shards_dir),
        )
    texts = read_all(shards_dir, found).items()
    return [parse_plan(text, where=shards_dir / name, fix=repair_command(shards_dir)) for name, text in texts]


def parse_plan(text: bytes, *, where: AnyPath, fix: str | None = None) -> Plan:
    """Read a plan whose shards are the rows from 0 to its last, each once.

    Raises:
        DataError: The text is no plan, or its shards do not add up to its rows.
    """
    plan = parse(Plan, text, where=where, fix=fix)
    require_whole(plan, where=where, fix=fix)
    return plan


def require_whole(plan: Plan, *, where: AnyPath, fix: str | None) -> None:
    """Check that a plan's shards are numbered from 0, and follow each other from row 0 to the last row.

    Raises:
        DataError: They do not.
    """
    end = 0
    problem = None if plan.shards else "it has no shards"
    for number, planned in enumerate(plan.shards):
        rows = f"rows {planned.start} to {planned.stop}"
        if planned.shard != number:
            problem = f"its entry {number} is shard {planned.shard}"
        elif planned.start != end:
            problem = f"shard {number} has {rows}, the shard before ends at {end}"
        elif not 0 <= planned.not_in_share <= planned.stop - planned.start or planned.stop == end:
            problem = f"shard {number} has {rows}, {planned.not_in_share} of them not in the share"
        end = planned.stop
        if problem:
            break
    if problem is None and end != plan.rows:
        problem = f"its shards end at row {end} of {plan.rows}"
    if problem:
        why = "rows would be missing from training, or be there twice"
        raise DataError(f"the shards do not add up: {problem}", where=str(where), why=why, fix=fix)


def read_plan(shards_dir: AnyPath) -> Plan:
    """The plan that counts now; that of the manifest in a copy for readers, which may lack the file.

    Raises:
        DataError: There is none, or a plan or the manifest is damaged.
    """
    plans = known_plans(shards_dir)
    if not plans:
        if not any(name.endswith(".json") for name in sizes(shards_dir / COMMITS)):
            raise no_shards(PLAN, shards_dir)
        raise DataError(
            f"there is no {PLAN}",
            where=str(shards_dir),
            why="what was to be scored is lost",
            fix=repair_command(shards_dir),
        )
    return plans[-1]
