import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import preference_rows, write_jsonl
from processes import until

from dpo_opt.precompute.engine import process_watchdog

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="processes are looked up in /proc, which is Linux's"
)

# Processes before the block, in it (by exec and by fork, each with a child of its own) and after it.
PARENT = """
import json, os, subprocess, sys, time
from dpo_opt.precompute.engine.process_watchdog import children_end_with_this_process

def sleeper():
    return subprocess.Popen(["sleep", "100"]).pid

before = sleeper()
with children_end_with_this_process():
    code = "import subprocess as s, time; print(s.Popen(['sleep', '100']).pid, flush=True); time.sleep(100)"
    engine = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = int(engine.stdout.readline())
    forked = os.fork()
    if forked == 0:
        time.sleep(100)
        os._exit(0)
    own = [engine.pid, worker, forked]
    if sys.argv[1] == "inside":
        time.sleep(1)
        print(json.dumps({"others": [before], "own": own}), flush=True)
        time.sleep(100)
    time.sleep(float(sys.argv[1]))
after = sleeper()
print(json.dumps({"others": [before, after], "own": own}), flush=True)
sys.stdin.readline()
os.kill(engine.pid, 9), os.kill(worker, 9), os.kill(forked, 9)
engine.wait(), os.waitpid(forked, 0)
sys.stdin.readline()
"""


def alive(pid: int) -> bool:
    return process_watchdog.start_time(pid) is not None


def watchers(parent: int) -> list[int]:
    """Processes that watch for the end of another."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if process_watchdog.__file__.encode() in words and str(parent).encode() in words:
            found.append(int(path.parent.name))
    return [pid for pid in found if alive(pid)]


@pytest.fixture
def parent(request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], dict[str, list[int]]]]:
    """A process that has started others, and their ids."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, request.param],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    pids = json.loads(process.stdout.readline())
    yield process, pids
    for pid in [process.pid, *pids["others"], *pids["own"]]:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("parent", ["0.0", "1.5", "inside"], indirect=True)
def test_what_the_block_started_ends_with_a_killed_process(
    parent: tuple[subprocess.Popen[str], dict[str, list[int]]],
) -> None:
    process, pids = parent
    assert all(alive(pid) for pid in [*pids["own"], *pids["others"]])
    # The watcher has looked after the block by then.
    time.sleep(1)
    process.kill()
    until(lambda: not any(alive(pid) for pid in pids["own"]), seconds=5)
    until(lambda: not watchers(process.pid), seconds=5)
    assert all(alive(pid) for pid in pids["others"])


@pytest.mark.parametrize("parent", ["0.0"], indirect=True)
def test_the_watcher_ends_with_what_it_watches(
    parent: tuple[subprocess.Popen[str], dict[str, list[int]]],
) -> None:
    process, _ = parent
    until(lambda: len(watchers(process.pid)) == 1, seconds=5)
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    until(lambda: not watchers(process.pid), seconds=5)
    assert process.poll() is None


def descendants(pid: int) -> set[int]:
    found: dict[int, str] = {}
    process_watchdog._collect(pid, found)
    return {*found} - {pid}


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("apart", ["0", "1"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_of_the_real_engine_survives(
    tiny_model: Path, tmp_path: Path, apart: str, number: signal.Signals
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", preference_rows(4000))
    shards = tmp_path / "shards"
    arguments = ["--model", tiny_model, "--data", data, "--shards", shards, "--pairs-per-shard", 8]
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "dpo_opt", "precompute", *map(str, arguments), "--backend", "vllm"],
            env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": apart, "PYTHONFAULTHANDLER": "1"},
            stdout=said,
            stderr=said,
        )
    try:
        until(lambda: len([*shards.glob("commits/*")]) > 2 or process.poll() is not None, seconds=120)
        children = descendants(process.pid)
        assert bool(children) == (apart == "1")
        process.send_signal(number)
        code = process.wait(timeout=30)
        until(lambda: not any(alive(pid) for pid in children), seconds=5)
    finally:
        process.kill()
    expected = 75 if number == signal.SIGTERM else -signal.SIGKILL
    assert code == expected, (tmp_path / "said").read_text(errors="replace")
