"""A folder's plans as far as they are known: read, or made again from the manifest or from the data."""

import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.shards.commits import commit_texts, is_at, read_commit
from dpo_opt.precompute.shards.make_plan import make_plan
from dpo_opt.precompute.shards.planned_columns import require_columns_of
from dpo_opt.precompute.shards.read_plan import (
    PLAN_NAME,
    parse_plan,
    plan_name,
    read_plan,
    with_covered_plan,
)
from dpo_opt.precompute.shards.reference import make_tokenizer, resolve_reference
from dpo_opt.schemas.attempts import commit_names
from dpo_opt.schemas.errors import DataError, quoted
from dpo_opt.schemas.fingerprint import ALL_FIELDS, follows, refuse_differences
from dpo_opt.schemas.locations import AnyPath, is_file, read_all, sizes
from dpo_opt.schemas.manifest import (
    COMMAND,
    COMMITS,
    PLAN,
    Manifest,
    Plan,
    to_json,
)
from dpo_opt.schemas.pairs import Numerics
from dpo_opt.schemas.plain_data import yaml_of
from dpo_opt.schemas.sidecars import Column


class RecoveredPlans(NamedTuple):
    """What was to be scored, as far as it is known."""

    known: list[Plan]
    """In order; the last one counts."""
    files: dict[str, str]
    """Files to write for them: name to text."""
    unwanted: list[str]
    """Names of plan files to remove: damaged ones."""
    lost_growth: bool
    """The plan by which the folder was to grow is lost."""
    columns: Mapping[str, Column]
    """Weights and margins of a plan that was made again from the data."""


def in_one_line(error: DataError) -> str:
    """Where the damage is and what it is, on one line whatever the folder is called."""
    return f"{quoted(error.where)}: {error.what}"


def recover_plans(shards_dir: AnyPath, manifest: Manifest | None, damaged: list[str]) -> RecoveredPlans:
    """The plans that can be read, what the manifest covers, or else what the data gives.

    Raises:
        ConfigError, DataError, FingerprintError: As ``repair``.
    """
    numbers = {name: int(m["number"] or 0) for name in sizes(shards_dir) if (m := PLAN_NAME.fullmatch(name))}
    texts = read_all(shards_dir, sorted(numbers, key=lambda name: numbers[name]))
    known: list[Plan] = []
    spelled: list[str] = []  # as they are: a plan of another version may have fewer or more keys
    last_is_lost = False
    for name, text in texts.items():
        try:
            known.append(parse_plan(text, where=shards_dir / name))
            spelled.append(text.decode("utf-8"))
            last_is_lost = False
        except DataError as error:
            damaged.append(in_one_line(error))
            last_is_lost = True
    if manifest is not None:
        known = with_covered_plan(known, manifest, shards_dir)
        spelled += map(to_json, known[len(spelled) :])
    lost_growth = last_is_lost and bool(known) and max(numbers.values()) >= len(known)
    columns: Mapping[str, Column] = {}
    if not known:
        made, columns = _plan_from_data(shards_dir)
        known.append(made)
        spelled.append(to_json(made))
    wanted = {plan_name(i): text for i, text in enumerate(spelled)}
    files = {name: text for name, text in wanted.items() if texts.get(name) != text.encode()}
    unwanted = [name for name in texts if name not in wanted]
    return RecoveredPlans(known, files, unwanted, lost_growth, columns)


def _plan_from_data(shards_dir: AnyPath) -> tuple[Plan, Mapping[str, Column]]:
    """The plan that the folder's commits are of, made as its first run made it, and its columns.

    Raises:
        ConfigError: The model of the settings is not there.
        DataError: There are no commits or no settings, or the data is not there.
        FingerprintError: What is there now is not what was scored.
    """
    names = list(commit_names(sizes(shards_dir / COMMITS)))
    commits = list(filter(None, map(read_commit, commit_texts(shards_dir, names).values())))
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
    settings = latest_settings(shards_dir, lost=PLAN)
    with tempfile.TemporaryDirectory(prefix="dpo-opt-") as elsewhere:
        # An empty folder, because a plan in it would be read first, and that one is damaged.
        try:
            config = PrecomputeConfig.model_validate(settings | {"shards": elsewhere})
        except ValidationError as error:
            first = error.errors()[0]
            name, reason = quoted(".".join(map(str, first["loc"]))), first["msg"]
            raise _no_settings(PLAN, f"{COMMAND} does not fit ({name}: {reason})", shards_dir) from error
        reference = resolve_reference(config)
        tokenizer = make_tokenizer(config, reference).on(scored.template_date)
        numerics = Numerics(**{name: getattr(scored, name) for name in Numerics._fields})
        planned = make_plan(config, reference=reference, tokenizer=tokenizer, numerics=numerics)
    plan = planned.plan
    fix = f"restore {PLAN}, or the data and the model that {COMMAND} names"
    if not follows(scored, plan.fingerprint):
        refuse_differences(
            cached=scored, current=plan.fingerprint, fields=ALL_FIELDS, where=str(shards_dir), fix=fix
        )
    plan = plan.model_copy(update={"fingerprint": scored})
    by_shard = {planned.shard: planned for planned in plan.shards}
    foreign = [c for c in commits if c.shard not in by_shard or not is_at(c, by_shard[c.shard], scored)]
    if foreign:
        raise DataError(
            f"the plan is lost, and shard {foreign[0].shard} is not one of the data that is there now",
            where=str(shards_dir),
            why="a plan of this data would not be that of what was scored",
            fix=fix,
        )
    require_columns_of(shards_dir, plan.columns)
    return plan, planned.columns


def latest_settings(shards_dir: AnyPath, *, lost: str) -> dict[str, Any]:
    """The settings of the folder's latest run; they name a model, and nothing else is known of them.

    Raises:
        DataError: They are lost or damaged too.
    """
    try:
        settings = yaml_of(read_all(shards_dir, [COMMAND]).get(COMMAND, b""))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise _no_settings(lost, f"there is no {COMMAND} to make it again by", shards_dir)
    if not isinstance(settings.get("model"), str):
        raise _no_settings(lost, f"{COMMAND} names no model", shards_dir)
    return settings


def _no_settings(lost: str, reason: str, shards_dir: AnyPath) -> DataError:
    return DataError(
        f"{lost} is lost or damaged, and {reason}",
        where=str(shards_dir),
        why="nothing else says which data and which model were scored",
        fix=f"restore {lost} from where the folder was copied, or pass another --shards folder",
    )
