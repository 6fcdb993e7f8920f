"""How fast a folder fills, from the times and machines that its commits state."""

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import NamedTuple

from pydantic import BaseModel

from dpo_opt.schemas.manifest import ShardCommit

_WINDOW = 15 * 60.0
"""Seconds before the last commit that the rate is taken of; longer where three shards take longer."""


class WorkerThroughput(BaseModel):
    """What one worker has done. Several processes may have been this worker, one after another."""

    host: str
    worker: int | None
    """Its number; None for the only one."""
    shards: int
    pairs: int
    """Source rows."""
    pairs_per_second: float
    """While it scored those shards."""
    seconds_since_commit: float


class Throughput(NamedTuple):
    """How fast all workers together are."""

    pairs_per_second: float | None
    """Source rows, lately; None if no commit states its time."""
    seconds_left: float | None
    """At that rate; None if nothing is left, or if the last commit is too long ago."""
    seconds_since_commit: float | None
    workers: list[WorkerThroughput]
    """By host and number."""


def throughput(commits: Collection[ShardCommit], *, rows_left: int, now: datetime) -> Throughput:
    """Rates from the times that commits state; commits of older folders state none, and do not count.

    Args:
        commits: One for each finished shard.
        rows_left: Source rows that are not scored yet.
        now: By this machine's clock; the commits' times are by those of their machines.
    """
    # As numbers, because a damaged record may state a time for which there is no date.
    times: dict[int, tuple[float, float]] = {
        c.shard: (c.finished.timestamp() - c.seconds, c.finished.timestamp())
        for c in commits
        if c.finished is not None and c.seconds is not None
    }
    timed = [commit for commit in commits if commit.shard in times]
    if not timed:
        return Throughput(None, None, None, [])
    last = max(end for _, end in times.values())
    window = max(_WINDOW, 3 * max(end - begin for begin, end in times.values()))
    recent = [commit for commit in timed if times[commit.shard][1] >= last - window]
    begun = min(times[commit.shard][0] for commit in recent)
    rate = _rows(recent) / max(last - begun, 1e-9)
    age = max(0.0, now.timestamp() - last)
    return Throughput(
        pairs_per_second=rate,
        seconds_left=rows_left / rate if rows_left and rate and age <= window else None,
        seconds_since_commit=age,
        workers=_workers(timed, times, now.timestamp()),
    )


def _workers(
    commits: Collection[ShardCommit], times: Mapping[int, tuple[float, float]], now: float
) -> list[WorkerThroughput]:
    groups: dict[tuple[str, int], list[ShardCommit]] = {}
    for commit in commits:
        key = (commit.host or "", -1 if commit.worker is None else commit.worker)
        groups.setdefault(key, []).append(commit)
    return [
        WorkerThroughput(
            host=host,
            worker=own[0].worker,
            shards=len(own),
            pairs=_rows(own),
            pairs_per_second=_rows(own) / max(sum(c.seconds or 0.0 for c in own), 1e-9),
            seconds_since_commit=max(0.0, min(now - times[c.shard][1] for c in own)),
        )
        for (host, _), own in sorted(groups.items())
    ]


def _rows(commits: Collection[ShardCommit]) -> int:
    return sum(commit.used for commit in commits)
