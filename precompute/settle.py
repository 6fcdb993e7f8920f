"""One plan for a folder, whoever comes first: written once, followed by all, extended for data that grew."""

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.plan import Planned, known_plans, make_plan, read_plan
from dpo_opt.precompute.reference import Reference, fingerprint_of
from dpo_opt.precompute.tokenize import PairTokenizer
from dpo_opt.precompute.weights_memo import remember_weights, weight_files
from dpo_opt.schemas.columns import COLUMNS, write_column
from dpo_opt.schemas.config_keys import differing_keys, keep_model_config
from dpo_opt.schemas.errors import DataError, FingerprintError
from dpo_opt.schemas.fingerprint import ALL_FIELDS, Fingerprint, follows, refuse_differences
from dpo_opt.schemas.locations import AnyPath, is_file, sizes
from dpo_opt.schemas.manifest import COMMAND, COMMITS, PLAN, TOKENIZER, Plan, to_json
from dpo_opt.schemas.models import read_config
from dpo_opt.schemas.pairs import Numerics
from dpo_opt.schemas.storage import settle_folder, write_text


def settle_plan(
    config: PrecomputeConfig, *, reference: Reference, tokenizer: PairTokenizer, numerics: Numerics
) -> Plan:
    """The folder's plan, made here or by another run for the same thing.

    One of several workers that finds a plan does not read all data again: it compares the rows of each shard
    with the plan when it reads them.

    Raises:
        DataError: A row is malformed, no pair survives tokenization, or the plan is gone.
        FingerprintError: The folder was planned for something else.
    """
    if config.worker_index is not None and not config.append and is_file(config.shards / PLAN):
        plan = read_plan(config.shards)
        tokenizer = tokenizer.on(plan.fingerprint.template_date)
        current = fingerprint_of(config, reference, tokenizer, numerics)
        _refuse_other_fingerprint(plan, current, config.shards, model=reference.folder)
        return plan
    files = weight_files(reference.folder)
    planned = make_plan(config, reference=reference, tokenizer=tokenizer, numerics=numerics)
    plan = adopt_plan(config, planned, tokenizer.tokenizer)
    remember_weights(config.shards, digest=plan.fingerprint.weights, files=files)
    return plan


def adopt_plan(config: PrecomputeConfig, planned: Planned, tokenizer: Any) -> Plan:
    """Write the plan and the columns beside it, or check that the folder already follows it.

    Returns:
        The folder's plan: the same, but for the date that a chat template is told; the first plan fixes it.

    Raises:
        DataError: The folder holds shards, but no plan that says what they are of.
        FingerprintError: The folder was planned for something else, or for the first of these rows only.
    """
    shards_dir, model = config.shards, planned.model
    new, earlier = planned.plan, planned.earlier
    # Asked first: whoever commits has written the plan before.
    holds_commits = any(name.endswith(".json") for name in sizes(shards_dir / COMMITS))
    plans = known_plans(shards_dir)
    new = _as_spelled_by(plans, _on_the_day_of(plans, new), shards_dir, model)
    if plans:
        _refuse_other_fingerprint(plans[-1], new.fingerprint, shards_dir, model=model)
    elif holds_commits:
        raise DataError(
            f"the folder holds scored shards, but no {PLAN}",
            where=str(shards_dir),
            why="nothing says which data they belong to",
            fix=f"restore {PLAN}, or pass another --shards folder",
        )
    if len(plans) == len(earlier):
        if not plans:
            _write_plan(config, planned, PLAN, tokenizer)
        elif plans[-1] == new:
            _restore_plan(shards_dir, plans[0])
        elif new.rows > plans[-1].rows and planned.known_digest == plans[-1].dataset_digest:
            _require_growth(config, plans[-1], new)
            _restore_plan(shards_dir, plans[0])
            _write_plan(config, planned, f"plan-{len(plans)}.json")
    # Another planner may have been first.
    plans = known_plans(shards_dir)
    new = _as_spelled_by(plans, _on_the_day_of(plans, new), shards_dir, model)
    existing = plans[-1] if plans else new
    _refuse_other_fingerprint(existing, new.fingerprint, shards_dir, model=model)
    if existing != new:
        raise _other_plan(existing, new, shards_dir, planned_meanwhile=len(plans) > len(earlier))
    # One that is there may be somebody's own by now; one that was removed is taken from the data again.
    _write_columns(shards_dir, planned, keep=sizes(shards_dir / COLUMNS))
    return existing


def _on_the_day_of(plans: Sequence[Plan], new: Plan) -> Plan:
    """A new plan with the folder's date: another run may have planned it before midnight."""
    date = plans[-1].fingerprint.template_date if plans else None
    if date is None or new.fingerprint.template_date is None:
        return new
    fingerprint = new.fingerprint.model_copy(update={"template_date": date})
    return new.model_copy(update={"fingerprint": fingerprint})


def _as_spelled_by(plans: Sequence[Plan], new: Plan, shards_dir: AnyPath, model: Path | None) -> Plan:
    """A new plan with the folder's fingerprint, where the two mean the same."""
    if not plans:
        return new
    cached, current = plans[-1].fingerprint, new.fingerprint
    if _differing_keys(cached, current, shards_dir, model) == {}:
        current = current.model_copy(update={"model_config_digest": cached.model_config_digest})
    return new.model_copy(update={"fingerprint": cached}) if follows(cached, current) else new


def _differing_keys(
    cached: Fingerprint, current: Fingerprint, shards_dir: AnyPath, model: Path | None
) -> dict[str, tuple[object, object]] | None:
    if model is None or cached.model_config_digest == current.model_config_digest:
        return None
    return differing_keys(shards_dir, cached_digest=cached.model_config_digest, model=model)


def _restore_plan(shards_dir: AnyPath, plan: Plan) -> None:
    """A copy for readers, which came without its plan, goes on as the folder that it was copied from does."""
    if not is_file(shards_dir / PLAN):
        with contextlib.suppress(FileExistsError):
            write_text(shards_dir / PLAN, to_json(plan), replace=False)


def _write_columns(shards_dir: AnyPath, planned: Planned, *, keep: Iterable[str] = ()) -> None:
    known = planned.earlier[-1].rows if planned.earlier else 0
    for name, column in planned.columns.items():
        if f"{name}.parquet" not in keep:
            write_column(shards_dir, name, column, keep_rows=known)


def _write_plan(config: PrecomputeConfig, planned: Planned, name: str, tokenizer: Any = None) -> None:
    """Write a plan where there is none of that name, after what belongs to it."""

    def write_companions() -> None:
        if tokenizer is not None:
            with settle_folder(config.shards / TOKENIZER) as private:
                tokenizer.save_pretrained(private)
            if planned.model is not None:
                keep_model_config(config.shards, read_config(planned.model))
        _write_columns(config.shards, planned)
        write_text(config.shards / COMMAND, _command(config))

    write_companions()
    with contextlib.suppress(FileExistsError):
        write_text(config.shards / name, to_json(planned.plan), replace=False)
        # Another planner may have written its own, before it found this plan and gave up.
        write_companions()


def _require_growth(config: PrecomputeConfig, last: Plan, new: Plan) -> None:
    """Whether the next plan's first shards are those of the last one, and somebody asked for it.

    Raises:
        FingerprintError: One of the two is not so.
    """
    if new.shards[: len(last.shards)] != last.shards:
        raise _other_plan(last, new, config.shards)
    if not config.append:
        raise FingerprintError(
            f"the data has grown from {last.rows} to {new.rows} rows since the folder was planned",
            where=str(config.shards),
            why="its first rows are those that the folder holds",
            fix="pass --append to score the new rows only, or another --shards folder",
        )


def _other_plan(
    existing: Plan, plan: Plan, shards_dir: AnyPath, *, planned_meanwhile: bool = False
) -> FingerprintError:
    different = (
        f"its data has {existing.rows} rows with digest {existing.dataset_digest[:16]}..., this data "
        f"{plan.rows} rows with digest {plan.dataset_digest[:16]}..."
        if existing.shards[0].stop == plan.shards[0].stop
        or existing.rows <= min(existing.shards[0].stop, plan.shards[0].stop)
        else f"its shards hold {existing.shards[0].stop} rows, --pairs-per-shard now gives "
        f"{plan.shards[0].stop}"
    )
    return FingerprintError(
        f"the folder was planned for another run: {different}",
        where=str(shards_dir),
        why="its shards would not belong together",
        fix="another run planned it meanwhile: run the same command again once that one is finalized"
        if planned_meanwhile
        else _OTHER_FOLDER,
    )


_OTHER_FOLDER = "pass another --shards folder, or remove this one to score it again"


def _refuse_other_fingerprint(
    plan: Plan, current: Fingerprint, shards_dir: AnyPath, *, model: Path | None
) -> None:
    refuse_differences(
        cached=plan.fingerprint,
        current=current,
        fields=ALL_FIELDS,
        config_keys=_differing_keys(plan.fingerprint, current, shards_dir, model),
        where=str(shards_dir),
        fix=_OTHER_FOLDER,
    )


def _command(config: PrecomputeConfig) -> str:
    """The settings as a file that ``--config`` reads, for whoever goes on with the folder."""
    settings = config.for_workers()
    settings["shards"] = str(config.shards.absolute())
    # What is no path here is a URL, a pattern or a name on the Hub.
    settings["data"] = [_absolute(name) for name in config.data]
    settings["model"] = _absolute(config.model)
    return yaml.safe_dump(settings, sort_keys=False)


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name
