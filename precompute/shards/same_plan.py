"""Whether a run's plan and fingerprint mean what a folder's mean: both may be spelled in several ways."""

from collections.abc import Sequence
from pathlib import Path

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.shards.other_plan import OTHER_FOLDER, OTHER_VERSION
from dpo_opt.schemas.config_keys import differing_keys
from dpo_opt.schemas.fingerprint import ALL_FIELDS, Fingerprint, follows, refuse_differences
from dpo_opt.schemas.locations import AnyPath
from dpo_opt.schemas.manifest import Plan
from dpo_opt.schemas.models import read_config


def as_the_folder_has_it(
    plans: Sequence[Plan], new: Plan, config: PrecomputeConfig, model: Path | None
) -> Plan:
    """A new plan in the spelling of the folder's."""
    return _as_spelled_by(plans, _with_the_day_of(plans, new, config), config.shards, model)


def _with_the_day_of(plans: Sequence[Plan], new: Plan, config: PrecomputeConfig) -> Plan:
    """A new plan with the date of the folder's plans: they may have been made before midnight."""
    date = plans[-1].fingerprint.template_date if plans and config.template_date is None else None
    if date is None or new.fingerprint.template_date is None:
        return new
    fingerprint = new.fingerprint.model_copy(update={"template_date": date})
    return new.model_copy(update={"fingerprint": fingerprint})


def _as_spelled_by(plans: Sequence[Plan], new: Plan, shards_dir: AnyPath, model: Path | None) -> Plan:
    """A new plan with the folder's fingerprint and shard size, if these mean the same as its own."""
    if not plans:
        return new
    if new.shards == plans[-1].shards:
        new = new.model_copy(update={"pairs_per_shard": plans[-1].pairs_per_shard})
    cached, current = plans[-1].fingerprint, new.fingerprint
    if _differing_keys(cached, current, shards_dir, model) == {}:
        current = current.model_copy(update={"model_config_digest": cached.model_config_digest})
    return new.model_copy(update={"fingerprint": cached}) if follows(cached, current) else new


def _differing_keys(
    cached: Fingerprint, current: Fingerprint, shards_dir: AnyPath, model: Path | None
) -> dict[str, tuple[object, object]] | None:
    if model is None or cached.model_config_digest == current.model_config_digest:
        return None
    return differing_keys(shards_dir, cached_digest=cached.model_config_digest, current=read_config(model))


def refuse_other_fingerprint(
    plan: Plan, current: Fingerprint, shards_dir: AnyPath, *, model: Path | None, fix: str | None = None
) -> None:
    """Compare a run's fingerprint with that of a folder's plan.

    Raises:
        FingerprintError: They differ.
    """
    same_version = plan.fingerprint.text_to_ids == current.text_to_ids
    refuse_differences(
        cached=plan.fingerprint,
        current=current,
        fields=ALL_FIELDS,
        config_keys=_differing_keys(plan.fingerprint, current, shards_dir, model),
        where=str(shards_dir),
        fix=fix or (OTHER_FOLDER if same_version else OTHER_VERSION),
    )
