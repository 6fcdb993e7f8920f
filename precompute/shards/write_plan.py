"""Writes a folder's plan once, whichever run is first; all runs follow it, and data that grew extends it."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.read.sources import refuse_inside
from dpo_opt.precompute.shards.finalize import require_beginning
from dpo_opt.precompute.shards.finished import is_finalized
from dpo_opt.precompute.shards.make_plan import Planned, make_plan
from dpo_opt.precompute.shards.model_tokenizer import put_tokenizer
from dpo_opt.precompute.shards.other_plan import other_plan
from dpo_opt.precompute.shards.planned_columns import (
    other_columns,
    write_columns,
)
from dpo_opt.precompute.shards.read_plan import (
    known_plans,
    plan_name,
    read_plan,
    read_plans,
    require_whole,
)
from dpo_opt.precompute.shards.reference import Reference, fingerprint_of, on_the_day_of
from dpo_opt.precompute.shards.refused_plan import REFUSED, is_refused, take_back
from dpo_opt.precompute.shards.same_plan import as_the_folder_has_it, refuse_other_fingerprint
from dpo_opt.precompute.shards.weights_memo import remember_weights, weight_files
from dpo_opt.precompute.tokens.tokenize import PairTokenizer
from dpo_opt.schemas.config_keys import keep_model_config
from dpo_opt.schemas.counts import counted
from dpo_opt.schemas.errors import DataError, DpoOptError, FingerprintError, quoted
from dpo_opt.schemas.locations import AnyPath, is_file, read_all, remove, sizes
from dpo_opt.schemas.manifest import (
    COMMAND,
    COMMITS,
    MANIFEST,
    PLAN,
    TOKENIZER,
    Plan,
    load_manifest,
    parse,
    repair_command,
    to_json,
)
from dpo_opt.schemas.models import read_config
from dpo_opt.schemas.pairs import Numerics
from dpo_opt.schemas.storage import settle_folder, write_text

_ONCE_FINALIZED = "another run planned it meanwhile: run the same command again once that one is finalized"
_WHOLE_TOKENIZER = "tokenizer.json"
"""The file that every fast tokenizer has. A store gets it last, so where it is, the tokenizer is whole."""


class _Claim(BaseModel):
    """What a run is about to plan. One run writes it, before the files that belong to the plan."""

    model_config = ConfigDict(frozen=True)

    plan: Plan


def settle_plan(
    config: PrecomputeConfig, *, reference: Reference, tokenizer: PairTokenizer, numerics: Numerics
) -> Plan:
    """The folder's plan, made here or by another run for the same thing.

    A worker that finds a plan does not read all data again. It compares each shard's rows with the plan when
    it scores them.

    Raises:
        ConfigError: The folder is inside the data.
        DataError: A row is malformed, no pair survives tokenization, or the plan is gone.
        FingerprintError: The folder was planned for something else.
    """
    refused = is_file(config.shards / REFUSED)
    if config.worker_index is not None and not (config.append or refused) and is_file(config.shards / PLAN):
        plan = read_plan(config.shards)
        tokenizer = on_the_day_of(plan, config, tokenizer)
        # Whether the data has these rows is seen when a shard is scored.
        rows = plan.fingerprint.rows
        current = fingerprint_of(config, reference, tokenizer, numerics, rows=rows)
        refuse_other_fingerprint(plan, current, config.shards, model=reference.folder)
        return plan
    refuse_inside(config, config.shards, option="--shards")
    files = weight_files(reference.folder)
    planned = make_plan(config, reference=reference, tokenizer=tokenizer, numerics=numerics)
    fill = functools.partial(put_tokenizer, reference.folder, tokenizer.tokenizer)
    plan = adopt_plan(config, planned, fill)
    with _for_later_runs(config.shards, plan):
        remember_weights(config.shards, digest=plan.fingerprint.weights, files=files)
    return plan


def adopt_plan(config: PrecomputeConfig, planned: Planned, fill: Callable[[Path], object]) -> Plan:
    """Write the plan and the files that belong to it, or check that the folder already follows it.

    The tokenizer, the weights of pairs and the settings are written before their plan. The first run to plan
    the folder claims the plan, and only runs that make the same plan write these files. So a folder with a
    plan has the files that belong to it, and no others. A run that is killed in between leaves its claim, and
    the same command continues with it.

    Args:
        config: Of the run.
        planned: What it would plan.
        fill: Puts the tokenizer's files into an empty folder.

    Returns:
        The folder's plan. It may differ from ``planned`` in the date that a chat template is told, which the
        folder's first plan fixes.

    Raises:
        DataError: The folder holds a tokenizer or commits, but no plan.
        FingerprintError: The folder was planned for something else, or for the first of these rows only.
    """
    shards_dir, model = config.shards, planned.model
    plans, new = require_place(config, planned)
    if len(plans) == len(planned.earlier):
        with _for_later_runs(shards_dir, new):
            _restore_plans(shards_dir, plans)
        if plans and plans[-1] == new:
            claim = _claim_of(shards_dir, plan_name(len(plans) - 1))
            if is_file(claim):
                with _for_later_runs(shards_dir, new):
                    remove(claim)
        else:
            _write_plan(config, planned, new, fill)
    # Another run may have written its plan first.
    plans = known_plans(shards_dir)
    new = as_the_folder_has_it(plans, new, config, model)
    existing = plans[-1] if plans else new
    refuse_other_fingerprint(existing, new.fingerprint, shards_dir, model=model)
    if existing != new:
        meanwhile = len(plans) > len(planned.earlier)
        raise other_plan(existing, new, config, fix=_ONCE_FINALIZED if meanwhile else None)
    with _for_later_runs(shards_dir, existing):
        write_columns(shards_dir, planned.columns, existing)
    _keep_command(config, existing)
    return existing


def require_place(config: PrecomputeConfig, planned: Planned) -> tuple[list[Plan], Plan]:
    """Check that a folder can take a plan, without writing anything.

    Returns:
        The folder's plans, and the new one in their spelling.

    Raises:
        DataError, FingerprintError: As ``adopt_plan``.
    """
    shards_dir, model = config.shards, planned.model
    # Looked at in this order: a run that writes these has a claim until its plan is written.
    begun = [folder for folder in (COMMITS, TOKENIZER) if any(map(_is_json, sizes(shards_dir / folder)))]
    claimed = is_file(_claim_of(shards_dir, PLAN))
    plans = known_plans(shards_dir)
    replaces = not planned.earlier and is_refused(shards_dir, plans)
    if replaces:
        plans = []
    new = as_the_folder_has_it(plans, planned.plan, config, model)
    if plans:
        refuse_other_fingerprint(plans[-1], new.fingerprint, shards_dir, model=model)
    elif begun and not claimed and not replaces:
        raise DataError(
            f"the folder holds {' and '.join(f'{name}/' for name in begun)}, but no {PLAN}",
            where=str(shards_dir),
            why="nothing says which data and which model they belong to",
            fix=repair_command(shards_dir)
            if COMMITS in begun
            else f"restore {PLAN}, or pass another --shards folder",
        )
    # If another run has planned meanwhile, `adopt_plan` compares the two plans later.
    if plans and plans[-1] != new and len(plans) == len(planned.earlier):
        if new.rows <= plans[-1].rows or planned.known_digest != plans[-1].dataset_digest:
            raise other_plan(plans[-1], new, config)
        if planned.known_columns != plans[-1].columns:
            raise other_columns(shards_dir, plans[-1].columns, planned.known_columns)
        _require_growth(config, plans[-1], new)
    if len(plans) == len(planned.earlier) and plans and is_file(shards_dir / MANIFEST):
        require_beginning(load_manifest(shards_dir), new, shards_dir)
    if len(plans) == len(planned.earlier) and new not in plans:
        name = plan_name(len(plans))
        claim = _read_claim(shards_dir, name)
        if claim is not None:
            _require_claim(claim, new, planned.model, config, name)
    return plans, new


def _is_json(name: str) -> bool:
    return name.endswith(".json")


def _restore_plans(shards_dir: AnyPath, plans: Sequence[Plan]) -> None:
    """Write plans that were lost, or that a folder was copied without, so that it continues as it was."""
    there = sizes(shards_dir)
    for name, plan in zip(map(plan_name, itertools.count()), plans, strict=False):
        if name not in there:
            with contextlib.suppress(FileExistsError):
                write_text(shards_dir / name, to_json(plan), replace=False)


@contextlib.contextmanager
def _for_later_runs(shards_dir: AnyPath, plan: Plan) -> Iterator[None]:
    """Where a finished folder cannot be written, leave undone what only a later run would find useful.

    Readers of a finished folder need no leave to write, and a run that finds nothing to score is one.
    """
    try:
        yield
    except (OSError, DpoOptError):
        if not is_finalized(shards_dir, plan):
            raise


def _keep_command(config: PrecomputeConfig, plan: Plan) -> None:
    """Keep the settings of the latest run, for the next one: data may have moved, or bad rows be skipped."""
    text = config.for_workers()
    if read_all(config.shards, [COMMAND]).get(COMMAND) != text.encode():
        with _for_later_runs(config.shards, plan):
            write_text(config.shards / COMMAND, text)


def _write_plan(
    config: PrecomputeConfig, planned: Planned, new: Plan, fill: Callable[[Path], object]
) -> None:
    """Write a plan after the files that belong to it. A plan of that name that is already there stays.

    Raises:
        FingerprintError: Another run has claimed a different plan.
    """
    name = plan_name(len(planned.earlier))
    shards_dir, claim = config.shards, _claim_of(config.shards, name)
    with contextlib.suppress(FileExistsError):
        write_text(claim, to_json(_Claim(plan=new)), replace=False)
    if name == PLAN and is_refused(shards_dir, read_plans(shards_dir)):
        # Read before the old plan goes, as another run of that plan may remove the claim.
        said = _claim_there(shards_dir, name)
        if said is not None:
            _require_claim(said, new, planned.model, config, name)
            take_back(shards_dir, first=_WHOLE_TOKENIZER)
    else:
        said = _read_claim(shards_dir, name)
    if said is not None:
        plan = _require_claim(said, new, planned.model, config, name)
        if name == PLAN:
            if not is_file(shards_dir / TOKENIZER / _WHOLE_TOKENIZER):
                write_tokenizer(shards_dir, fill)
            if planned.model is not None:
                keep_model_config(shards_dir, read_config(planned.model))
        before = planned.earlier[-1] if planned.earlier else None
        write_columns(shards_dir, planned.columns, plan, before=before)
        with contextlib.suppress(FileExistsError):
            write_text(shards_dir / name, to_json(plan), replace=False)
    remove(claim)


def write_tokenizer(shards_dir: AnyPath, fill: Callable[[Path], object]) -> None:
    """Put a tokenizer's files into a folder that has none, or only some of them."""
    with settle_folder(shards_dir / TOKENIZER, last=_WHOLE_TOKENIZER) as private:
        fill(private)


def _claim_of(shards_dir: AnyPath, name: str) -> AnyPath:
    return shards_dir / f"{name}.claim"


def _read_claim(shards_dir: AnyPath, name: str) -> _Claim | None:
    """The claim of the run that is writing a plan; None if the plan is written, or no run is writing it.

    Raises:
        DataError: The claim is damaged.
    """
    claim = _claim_there(shards_dir, name)
    # A run removes its claim after it wrote the plan. So if there is no plan yet, the claim still holds.
    return None if is_file(shards_dir / name) else claim


def _claim_there(shards_dir: AnyPath, name: str) -> _Claim | None:
    """The claim of a plan, whether or not a plan of that name is written.

    Raises:
        DataError: The claim is damaged.
    """
    path = _claim_of(shards_dir, name)
    text = read_all(shards_dir, [path.name]).get(path.name)
    if text is None:
        return None
    fix = f"rm {quoted(path)}, then run the same command again"
    claim = parse(_Claim, text, where=path, fix=fix)
    require_whole(claim.plan, where=path, fix=fix)
    return claim


def _require_claim(claim: _Claim, own: Plan, model: Path | None, config: PrecomputeConfig, name: str) -> Plan:
    """The plan that a claim is for, if it is the same as this run's.

    Raises:
        FingerprintError: It is a different plan.
    """
    shards_dir = config.shards
    there = "remove the folder, which holds no log-prob yet"
    if name != PLAN:
        there = f"rm {quoted(_claim_of(shards_dir, name))}"
    fix = f"{_ONCE_FINALIZED}; or, if it was killed, {there}"
    new = as_the_folder_has_it([claim.plan], own, config, model)
    refuse_other_fingerprint(claim.plan, new.fingerprint, shards_dir, model=model, fix=fix)
    if claim.plan != new:
        raise other_plan(claim.plan, new, config, fix=fix)
    return claim.plan


def _require_growth(config: PrecomputeConfig, last: Plan, new: Plan) -> None:
    """Check that a plan begins with the shards of the last one, and that ``--append`` was passed.

    Raises:
        FingerprintError: It does not, or it was not.
    """
    if new.shards[: len(last.shards)] != last.shards:
        raise other_plan(last, new, config)
    if not config.append:
        raise FingerprintError(
            f"the data has grown from {last.rows} to {counted(new.rows, 'row')} since the folder was planned",
            where=str(config.shards),
            why="its first rows are those that the folder holds",
            fix="pass --append to score the new rows only, or another --shards folder",
        )
