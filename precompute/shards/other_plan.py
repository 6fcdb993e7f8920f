"""The error of a run whose data or settings do not give a folder's plan, with the setting that does."""

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.shards.planned_columns import other_columns
from dpo_opt.precompute.shards.recover_plan import latest_settings
from dpo_opt.schemas.counts import counted
from dpo_opt.schemas.errors import DataError, FingerprintError, quoted
from dpo_opt.schemas.locations import AnyPath
from dpo_opt.schemas.manifest import COMMAND, PLAN, Plan

OTHER_FOLDER = "pass another --shards folder, or remove this one to score it again"
OTHER_VERSION = "go on with the version of dpo-opt that began the folder, or pass another --shards folder"


def other_plan(
    existing: Plan, plan: Plan, config: PrecomputeConfig, *, fix: str | None = None
) -> FingerprintError:
    """The error.

    Args:
        existing: The folder's plan, or the one that another run has claimed.
        plan: This run's.
        config: Of this run.
        fix: Where the folder's own settings are no way out.
    """
    shards_dir = config.shards
    if existing.model_copy(update={"columns": plan.columns}) == plan:
        return other_columns(shards_dir, existing.columns, plan.columns, fix=fix)
    as_planned = None
    share, own_share = _planned_share(shards_dir), _share(config.data_share)
    lengths = None if plan.pairs_per_shard == existing.pairs_per_shard else _lengths(existing, plan)
    if existing.used == existing.rows == plan.used < plan.rows:
        # Versions before `not_in_share` numbered rows so.
        different = "its rows are numbered within --data-share, and not as the source has them"
    elif share is not None and share != own_share:
        different = f"it has {_options(share)}, this run {_options(own_share)}"
        how = f"pass {_options(share)}" if share else "leave --data-share out"
        as_planned = f"{how}, as {quoted(shards_dir / COMMAND)} has it"
    elif lengths is None:
        different = (
            f"its data has {counted(existing.rows, 'row')} with digest {existing.dataset_digest[:16]}..., "
            f"this data {counted(plan.rows, 'row')} with digest {plan.dataset_digest[:16]}..."
        )
    else:
        different = f"its shards hold {counted(lengths[0], 'row')}, --pairs-per-shard now gives {lengths[1]}"
        if existing.pairs_per_shard is not None:
            as_planned = (
                f"pass --pairs-per-shard {existing.pairs_per_shard}, as the folder's last plan has it"
            )
    return FingerprintError(
        f"the folder was planned for another run: {different}",
        where=str(shards_dir),
        why="its shards would not belong together",
        fix=fix or as_planned or OTHER_FOLDER,
    )


def _lengths(existing: Plan, plan: Plan) -> tuple[int, int] | None:
    """How many rows the first shards hold that differ; None if the data ends there."""
    pairs = list(zip(existing.shards, plan.shards, strict=False))
    theirs, ours = next((pair for pair in pairs if pair[0].used != pair[1].used), pairs[0])
    # A last shard may be short because the data ends there.
    last, longer = (existing.shards[-1], plan.shards[-1]), theirs.used < ours.used
    by_size = theirs.used != ours.used and (theirs if longer else ours) not in last
    return (theirs.used, ours.used) if by_size else None


def _planned_share(shards_dir: AnyPath) -> list[float] | None:
    """The shares of the latest run that followed the folder's plan; None if they are not known."""
    try:
        shares = latest_settings(shards_dir, lost=PLAN).get("data_share", [])
        return _share([float(share) for share in shares])
    except (DataError, TypeError, ValueError):
        return None


def _share(shares: list[float]) -> list[float]:
    """Shares, none if all rows are taken."""
    return shares if any(share != 1 for share in shares) else []


def _options(shares: list[float]) -> str:
    return " ".join(f"--data-share {share!r}" for share in shares) or "no --data-share"
