"""Which shards a worker takes: each once, whoever dies."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fakes import ScriptedScorer, preference_rows, write_jsonl

from dpo_opt.launch import launch
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.engine.process_watchdog import start_time
from dpo_opt.precompute.run import precompute, work
from dpo_opt.precompute.shards.finalize import finalize
from dpo_opt.precompute.workers import assignment
from dpo_opt.precompute.workers.assignment import Worker, worker_from_environment
from dpo_opt.schemas.errors import ConfigError, DpoOptError
from dpo_opt.schemas.progress import Silent

Configs = Callable[..., PrecomputeConfig]


@pytest.fixture
def config_of(tiny_model: Path, tmp_path: Path) -> Configs:
    data = write_jsonl(tmp_path / "data.jsonl", preference_rows(12))

    def config(**settings: Any) -> PrecomputeConfig:
        values = {"model": str(tiny_model), "data": data, "shards": tmp_path / "shards", "pairs_per_shard": 4}
        return PrecomputeConfig.model_validate(values | settings)

    return config


@pytest.fixture
def looking_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assignment, "_SECONDS_BETWEEN_LOOKS", 0.02)


def slow(_: int) -> None:
    time.sleep(0.3)


@pytest.mark.usefixtures("looking_often")
@pytest.mark.parametrize("numbered", [True, False])
def test_more_workers_than_shards_score_each_shard_once(config_of: Configs, numbered: bool) -> None:
    """Also launches that know nothing of each other: each takes itself for the only one."""
    count = 6
    scorers = [ScriptedScorer(before_call=slow) for _ in range(count)]
    configs = [
        config_of(**({"worker_index": i, "num_workers": count} if numbered else {})) for i in range(count)
    ]
    barrier = threading.Barrier(count)

    def run(i: int) -> int:
        barrier.wait()
        time.sleep(0.1 * i)
        return work(configs[i], scorer=scorers[i])

    with ThreadPoolExecutor(count) as pool:
        scored = list(pool.map(run, range(count)))
    assert sum(scored) == sum(len(scorer.calls) for scorer in scorers) == 3
    assert finalize(config_of().shards).kept == 12
    assert not list(config_of().shards.glob("commits/.*"))


def mark(shards: Path, shard: int, process: object) -> Path:
    path = shards / "commits" / f".{shard:05d}.00000000.tmp"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(process))
    return path


def dead_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


@pytest.fixture
def sleeping() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.mark.usefixtures("looking_often")
@pytest.mark.parametrize("state", ["dead", "a zombie", "another's number", "alive", "alive, as before"])
def test_a_mark_counts_while_its_process_is_there(
    config_of: Configs,
    state: str,
    sleeping: "subprocess.Popen[bytes]",
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shards = Path(str(config_of().shards))
    begun: list[str | None] = [start_time(sleeping.pid)]
    if state == "another's number":
        begun = [str(int(begun[0] or 0) - 1)]
    elif state == "alive, as before":
        begun = []  # an earlier version's
    elif state in ("dead", "a zombie"):
        sleeping.kill()
        os.waitid(os.P_PID, sleeping.pid, os.WEXITED | os.WNOWAIT)
        if state == "dead":
            sleeping.wait()
    assert Path(f"/proc/{sleeping.pid}").exists() == (state != "dead")
    mark(shards, 0, [socket.gethostname(), sleeping.pid, "0badc0de", *begun])
    order: list[int] = []

    def look(_: int) -> None:
        order.extend(shard for shard, (_, process, *_) in marks(shards).items() if process == os.getpid())

    # A mark that counts is believed for a while all the same.
    monkeypatch.setattr(assignment, "_PATIENCE_WITHOUT_EXPERIENCE", 1.0)
    monkeypatch.setattr(assignment, "_LEAST_PATIENCE", 1.0)
    assert precompute(config_of(), scorer=ScriptedScorer(before_call=look)).kept == 12
    assert sorted(order) == [0, 1, 2]
    assert (order[0] != 0) == state.startswith("alive")


def marks(shards: Path) -> dict[int, list[Any]]:
    """What each marked shard's mark says."""
    return {int(path.name[1:6]): json.loads(path.read_text()) for path in shards.glob("commits/.*.tmp")}


@pytest.mark.usefixtures("looking_often")
def test_a_mark_says_since_when_its_process_runs(config_of: Configs) -> None:
    config, found = config_of(), []

    def look(_: int) -> None:
        found.extend(marks(Path(str(config.shards))).values())

    precompute(config, scorer=ScriptedScorer(before_call=look))
    assert len(found) == 3
    for host, process, _, begun in found:
        assert (host, process) == (socket.gethostname(), os.getpid())
        assert begun == start_time(os.getpid()) is not None


@pytest.mark.parametrize("may_signal", [True, False])
@pytest.mark.parametrize("has_proc", [True, False])
def test_a_process_that_cannot_be_seen_is_believed(
    sleeping: "subprocess.Popen[bytes]", may_signal: bool, has_proc: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's may be hidden, and not every system has a /proc; only one's own would be seen there."""

    def signal_it(process: int, number: int) -> None:
        assert (process, number) == (sleeping.pid, 0)
        if not may_signal:
            raise PermissionError

    monkeypatch.setattr(os, "kill", signal_it)
    monkeypatch.setattr(
        assignment, "start_time", lambda process: "5" if has_proc and process == os.getpid() else None
    )
    text = json.dumps([socket.gethostname(), sleeping.pid, "0badc0de", "7"]).encode()
    assert assignment._is_gone(text) == (may_signal and has_proc)


@pytest.mark.usefixtures("looking_often")
def test_the_shard_of_a_dead_worker_is_scored_by_the_others(
    config_of: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, process in enumerate((dead_process(), os.getpid())):  # of a container, it may be one's own
        config = config_of(shards=f"{config_of().shards}-{number}")
        mark(Path(str(config.shards)), 0, [socket.gethostname(), process, "0badc0de"])
        before = time.monotonic()
        assert precompute(config, scorer=ScriptedScorer()).kept == 12
        assert time.monotonic() - before < 5
    # Of another machine it shows only by the time that it takes.
    other = config_of(shards=f"{config.shards}-elsewhere")
    mark(Path(str(other.shards)), 0, ["elsewhere", 1, "0badc0de"])
    monkeypatch.setattr(assignment, "_LEAST_PATIENCE", 1.0)
    before = time.monotonic()
    assert precompute(other, scorer=ScriptedScorer()).kept == 12
    assert 1 <= time.monotonic() - before < 5


def deep(path: Path) -> None:
    path.write_text("[" * 200_000)


NO_MARKS: dict[str, Callable[[Path], object]] = {
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to a folder": lambda path: path.symlink_to("."),
    "a pipe": os.mkfifo,
    "deep JSON": deep,
    "a folder": Path.mkdir,
}


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("looking_often")
@pytest.mark.parametrize("name", NO_MARKS)
def test_what_no_worker_sets_stops_no_worker(
    config_of: Configs, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of()
    monkeypatch.setattr(assignment, "_PATIENCE_WITHOUT_EXPERIENCE", 0.1)
    monkeypatch.setattr(assignment, "_LEAST_PATIENCE", 0.1)
    path = Path(str(config.shards)) / "commits" / ".00001.00000000.tmp"
    path.parent.mkdir(parents=True)
    NO_MARKS[name](path)
    if name == "a folder":
        with pytest.raises(
            DpoOptError, match="a folder has the name by which a worker marks shard 1"
        ) as caught:
            precompute(config, scorer=ScriptedScorer())
        assert caught.value.where == str(path)
        assert caught.value.fix == f"rm -r {path}, then run the same command again"
        path.rmdir()
    assert precompute(config, scorer=ScriptedScorer()).kept == 12
    assert not os.path.lexists(path)


@pytest.mark.parametrize("launcher", ["slurm", "ray", "local"])
def test_no_more_workers_are_launched_than_there_are_shards(
    config_of: Configs, launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    said: list[str] = []

    class Told:
        def say(self, line: str) -> None:
            said.append(line)

    def start(config: PrecomputeConfig, *_: object) -> Any:
        started.append(config.num_workers or 0)
        precompute(config.model_copy(update={"num_workers": None}), scorer=make_scorer(config))
        return {} if launcher == "slurm" else []

    from dpo_opt.scorers import make_scorer

    places = {
        "slurm": "dpo_opt.precompute.workers.slurm.launch_array",
        "ray": "dpo_opt.precompute.workers.ray_cluster.run_workers",
        "local": "dpo_opt.launch.run_here",
    }
    monkeypatch.setattr(places[launcher], start)
    settings: dict[str, Any] = {"num_workers": 7, "launcher": launcher, "backend": "hf", "gpus_per_worker": 0}
    launch(config_of(**settings), progress=Told())  # type: ignore[arg-type]
    assert started == [3]
    assert [line.partition(":")[0] for line in said] == ["3 of 7 workers are enough"]


@pytest.mark.parametrize("submit", [False, True])
def test_no_worker_is_said_to_be_started_where_none_is(
    config_of: Configs, submit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    class Told(Silent):
        def say(self, line: str) -> None:
            said.append(line)

    monkeypatch.setenv("PATH", "")
    settings: dict[str, Any] = {"num_workers": 7, "launcher": "slurm", "backend": "hf", "submit": submit}
    with pytest.raises(ConfigError, match="no sbatch") if submit else contextlib.nullcontext():
        assert launch(config_of(**settings), progress=Told())["submitted"] is False
    assert [line.partition(".")[0] for line in said] == [
        "3 of 7 workers are enough: 3 of 3 shards are left to score"
    ]


STEP = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "9"}
ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_STEP": "2"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (STEP, Worker(2, 4)),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        # A batch script that runs once for all its tasks.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),
        (ARRAY | {"SLURM_ARRAY_TASK_COUNT": "5"}, Worker(2, 5)),
        (ARRAY | {"SLURM_ARRAY_TASK_COUNT": "5"} | STEP, Worker(10, 20)),
        ({"RANK": "1", "WORLD_SIZE": "2"} | STEP, Worker(1, 2)),
    ],
)
def test_a_scheduler_says_which_worker_this_is(environment: dict[str, str], expected: Worker | None) -> None:
    assert worker_from_environment(environment) == expected


def test_a_scheduler_that_says_nonsense_is_refused() -> None:
    with pytest.raises(ConfigError, match="do not say which worker"):
        worker_from_environment(STEP | {"SLURM_PROCID": "x"})
