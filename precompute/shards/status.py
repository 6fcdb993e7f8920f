"""How far a folder is: what ``dpo-opt status`` prints."""

from collections import Counter
from datetime import UTC, datetime

from pydantic import BaseModel

from dpo_opt.precompute.shards.commits import committed
from dpo_opt.precompute.shards.finished import covers, lost_columns, lost_files
from dpo_opt.precompute.shards.read_plan import read_plan
from dpo_opt.precompute.shards.throughput import WorkerThroughput, throughput
from dpo_opt.schemas.errors import quoted
from dpo_opt.schemas.locations import AnyPath, is_file
from dpo_opt.schemas.manifest import MANIFEST, load_manifest, repair_command, resume_command
from dpo_opt.schemas.shards import UNPAIRED


class Status(BaseModel):
    """How far a folder is."""

    shards_total: int
    shards_committed: int
    unpaired: bool
    """Whether each of what is called pairs here is one completion and its label."""
    pairs_total: int
    """Source rows, without those that ``--data-share`` leaves out."""
    pairs_kept: int
    pairs_dropped: int
    dropped: dict[str, int]
    share_done: float
    """Share of the source rows that is scored."""
    pairs_per_second: float | None
    """Source rows, of all workers, lately. Here and below: None if no commit states its time."""
    seconds_left: float | None
    """None also if nothing is left, or if the last commit is long ago."""
    seconds_since_commit: float | None
    workers: list[WorkerThroughput]
    finalized: bool
    """Whether readers may use the folder: its manifest covers the plan, and no file of it is lost or cut."""
    lost: list[str]
    """Files of the manifest that are lost or cut, each with what is wrong."""
    next: str | None
    """The command that heals the folder; None if nothing is lost."""


def status(shards_dir: AnyPath) -> Status:
    """Progress of a folder, from its commits.

    Raises:
        DataError: The folder has no plan, or its manifest is damaged.
    """
    plan = read_plan(shards_dir)
    done = committed(shards_dir, plan)
    dropped: Counter[str] = Counter()
    for commit in done.values():
        dropped.update(commit.dropped)
    scored = sum(commit.used for commit in done.values())
    manifest = load_manifest(shards_dir) if is_file(shards_dir / MANIFEST) else None
    lost = [] if manifest is None else list(lost_files(shards_dir, manifest))
    columns = [] if manifest is None else lost_columns(shards_dir, manifest)
    heals = repair_command if lost else resume_command
    lost += columns
    rates = throughput(done.values(), rows_left=plan.used - scored, now=datetime.now(UTC))
    return Status(
        shards_total=len(plan.shards),
        shards_committed=len(done),
        unpaired=plan.fingerprint.rows == UNPAIRED,
        pairs_total=plan.used,
        pairs_kept=sum(c.rows for c in done.values()),
        pairs_dropped=sum(dropped.values()),
        dropped=dict(sorted(dropped.items())),
        share_done=scored / plan.used,
        **rates._asdict(),
        finalized=manifest is not None and covers(manifest, plan) and not lost,
        lost=[f"{quoted(shards_dir / name)}: {problem}" for name, problem in lost],
        next=heals(shards_dir) if lost else None,
    )
