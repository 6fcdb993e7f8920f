from datetime import UTC, datetime, timedelta

import pytest
from fakes import FINGERPRINT

from dpo_opt.precompute.shards.commits import read_commit
from dpo_opt.precompute.shards.throughput import throughput
from dpo_opt.schemas.manifest import ShardCommit, to_json

NOON = datetime(2026, 11, 28, 12, tzinfo=UTC)
ROWS = 100


def commit(
    shard: int, *, minute: float, seconds: float = 60, host: str = "a", worker: int | None = 0
) -> ShardCommit:
    """A shard of 100 rows, finished at a minute after noon."""
    return ShardCommit(
        shard=shard,
        start=ROWS * shard,
        stop=ROWS * (shard + 1),
        attempt=f"{shard:08x}",
        file=f"data/{shard:05d}-{shard:08x}.parquet",
        rows=ROWS,
        bytes=1,
        sha256="a" * 64,
        dropped_file=f"dropped/{shard:05d}-{shard:08x}.parquet",
        dropped_sha256="b" * 64,
        dropped={},
        truncated=0,
        tokens=1,
        unique_sequences=1,
        rows_digest="c" * 64,
        fingerprint=FINGERPRINT,
        host=host,
        worker=worker,
        finished=NOON + timedelta(minutes=minute),
        seconds=seconds,
    )


def test_workers_at_once_add_up() -> None:
    commits = [commit(2 * i + w, minute=i + 1, worker=w) for i in range(3) for w in range(2)]
    found = throughput(commits, rows_left=400, now=NOON + timedelta(minutes=3, seconds=30))
    assert found.pairs_per_second == pytest.approx(600 / 180)
    assert found.seconds_left == pytest.approx(400 / (600 / 180))
    assert found.seconds_since_commit == pytest.approx(30)
    assert [(w.host, w.worker, w.shards, w.pairs) for w in found.workers] == [
        ("a", 0, 3, 300),
        ("a", 1, 3, 300),
    ]
    assert [w.pairs_per_second for w in found.workers] == pytest.approx([100 / 60] * 2)
    assert [w.seconds_since_commit for w in found.workers] == pytest.approx([30, 30])


def test_the_rate_is_of_late_and_workers_keep_theirs() -> None:
    """Before a pause of hours another machine was at it, ten times as fast."""
    commits = [
        *(commit(i, minute=i / 10, seconds=6, host="fast", worker=None) for i in range(10)),
        *(commit(10 + i, minute=300 + i, host="slow") for i in range(3)),
    ]
    found = throughput(commits, rows_left=100, now=NOON + timedelta(minutes=302))
    assert found.pairs_per_second == pytest.approx(300 / 180)
    assert [(w.host, w.worker) for w in found.workers] == [("fast", None), ("slow", 0)]
    assert [w.pairs_per_second for w in found.workers] == pytest.approx([100 / 6, 100 / 60])


def test_no_time_is_left_where_nothing_is_or_nobody_works() -> None:
    commits = [commit(0, minute=0)]
    assert throughput(commits, rows_left=0, now=NOON).seconds_left is None
    assert throughput(commits, rows_left=100, now=NOON).seconds_left == pytest.approx(60)
    late = throughput(commits, rows_left=100, now=NOON + timedelta(hours=1))
    assert (late.seconds_left, late.seconds_since_commit) == (None, 3600)


def test_a_long_shard_is_no_pause() -> None:
    found = throughput([commit(0, minute=0, seconds=3600)], rows_left=100, now=NOON + timedelta(hours=1))
    assert found.seconds_left == pytest.approx(3600)


def test_commits_of_older_folders_state_no_time() -> None:
    old = commit(0, minute=0).model_copy(update={"finished": None, "seconds": None, "host": None})
    assert throughput([old], rows_left=1, now=NOON) == (None, None, None, [])
    assert throughput([], rows_left=1, now=NOON) == (None, None, None, [])


def test_a_clock_that_is_ahead_makes_no_negative_age() -> None:
    assert throughput([commit(0, minute=5)], rows_left=1, now=NOON).seconds_since_commit == 0


@pytest.mark.parametrize(
    "absurd",
    [
        {"finished": datetime(1, 1, 1, tzinfo=UTC), "seconds": 1e9},
        {"finished": datetime(9999, 12, 31, tzinfo=UTC)},
        {"seconds": 1e300},
        {"seconds": 0.0},
        {"start": 100},
    ],
    ids=str,
)
def test_absurd_times_break_nothing(absurd: dict[str, object]) -> None:
    found = throughput([commit(0, minute=0).model_copy(update=absurd)], rows_left=100, now=NOON)
    assert found.workers[0].shards == 1
    assert (found.seconds_since_commit or 0) >= 0


@pytest.mark.parametrize("seconds", ["-1", "NaN", "Infinity", '"long"'])
def test_a_commit_whose_time_is_none_is_unreadable(seconds: str) -> None:
    text = to_json(commit(0, minute=0, seconds=60))
    assert read_commit(text.encode()) is not None
    assert read_commit(text.replace('"seconds": 60.0', f'"seconds": {seconds}').encode()) is None
