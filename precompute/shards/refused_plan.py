"""A plan under which nothing is scored, because the run that made it was refused: another may take its place.

An engine is started after the plan is written. Where it refuses the model or the settings, what is wrong is
mended, and the same folder is planned anew. A plan that was not refused stands, even before anything is
scored, because workers that follow it may be waiting for their turn.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

from dpo_opt.schemas.errors import DpoOptError, Preempted
from dpo_opt.schemas.locations import AnyPath, read_all, remove, sizes
from dpo_opt.schemas.manifest import COMMITS, DATA, DROPPED, PLAN, TOKENIZER, Plan, to_json
from dpo_opt.schemas.sidecars import COLUMNS, is_planned_file
from dpo_opt.schemas.storage import file_names, write_text

REFUSED = f"{PLAN}.refused"
"""The digest of a plan whose last run was refused."""


@contextlib.contextmanager
def refusal_noted(shards_dir: AnyPath, plan: Plan) -> Iterator[None]:
    """Note a refusal within the block, if nothing is scored then. An earlier note counts no longer.

    Args:
        shards_dir: Folder of reference shards.
        plan: What the block scores.
    """
    if REFUSED in sizes(shards_dir, prefix=PLAN):
        remove(shards_dir / REFUSED)
    try:
        yield
    except Preempted:
        raise
    except DpoOptError:
        # A folder that cannot be written keeps its plan; the refusal matters more.
        with contextlib.suppress(OSError, DpoOptError):
            # Others may be at shards of it still, and are refused as this run was.
            if all(name.startswith(".") for name in _work(shards_dir)):
                write_text(shards_dir / REFUSED, _digest(plan))
        raise


def is_refused(shards_dir: AnyPath, plans: Sequence[Plan]) -> bool:
    """Whether a folder's plan may be replaced: its last run was refused, and nobody scored or is scoring.

    Args:
        shards_dir: Folder of reference shards.
        plans: Its plans; a folder that has grown holds scored rows.
    """
    if len(plans) != 1:
        return False
    noted = read_all(shards_dir, [REFUSED]).get(REFUSED)
    return noted == _digest(plans[0]).encode() and not _work(shards_dir)


def take_back(shards_dir: AnyPath, *, first: str) -> None:
    """Remove a refused plan and what belongs to it. The plan goes last: after a kill it is removed again.

    Args:
        shards_dir: Folder of reference shards.
        first: The file of its tokenizer without which the others do not count.
    """
    remove(shards_dir / TOKENIZER / first)
    for name in file_names(shards_dir / TOKENIZER):
        remove(shards_dir / TOKENIZER / name)
    for name in sizes(shards_dir / COLUMNS):
        if is_planned_file(f"{COLUMNS}/{name}"):
            remove(shards_dir / COLUMNS / name)
    remove(shards_dir / PLAN)
    remove(shards_dir / REFUSED)


def _work(shards_dir: AnyPath) -> list[str]:
    """The files of workers: what is scored and, with a dot first, the marks of what is being scored."""
    return [name for folder in (COMMITS, DATA, DROPPED) for name in sizes(shards_dir / folder)]


def _digest(plan: Plan) -> str:
    return hashlib.sha256(to_json(plan).encode()).hexdigest()
