import contextlib
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fakes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import NUMERICS, ScriptedScorer, preference_rows, write_jsonl

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.run import precompute, work
from dpo_opt.precompute.shards.finalize import finalize
from dpo_opt.precompute.shards.reference import make_tokenizer, resolve_reference
from dpo_opt.precompute.shards.status import status
from dpo_opt.precompute.shards.write_plan import settle_plan
from dpo_opt.precompute.workers import ray_cluster
from dpo_opt.precompute.workers.ray_cluster import run_workers
from dpo_opt.preemption import preemptible
from dpo_opt.schemas.errors import ConfigError, DataError, DpoOptError, Interrupted, Preempted
from dpo_opt.schemas.manifest import load_manifest

ROWS = preference_rows(24)
ROWS[6]["rejected"] = ROWS[6]["chosen"]  # dropped
SHARDS = 12

Configs = Callable[..., PrecomputeConfig]


@pytest.fixture
def config_of(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configs:
    # Set by workers, and here the fake's workers are this process.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    data = write_jsonl(tmp_path / "data.jsonl", ROWS)

    def config(**settings: Any) -> PrecomputeConfig:
        values = {
            "model": str(tiny_model),
            "data": data,
            "shards": tmp_path / "shards",
            "pairs_per_shard": 2,
            "launcher": "ray",
            "num_workers": 4,
            "gpus_per_worker": 0,
        }
        return PrecomputeConfig.model_validate(values | settings)

    return config


def planned(config: PrecomputeConfig) -> PrecomputeConfig:
    """The same configuration, once its folder has a plan."""
    reference = resolve_reference(config)
    settle_plan(config, reference=reference, tokenizer=make_tokenizer(config, reference), numerics=NUMERICS)
    return config


def content(shards: Path) -> pa.Table:
    manifest = load_manifest(shards)
    return pa.concat_tables([pq.read_table(shards / s.file) for s in manifest.shards])


def undisturbed(config: PrecomputeConfig) -> pa.Table:
    """What one process writes that nothing happens to."""
    alone = config.model_copy(
        update={"launcher": "local", "num_workers": None, "shards": config.shards.with_name("undisturbed")}
    )
    precompute(alone, scorer=ScriptedScorer())
    return content(alone.shards)


# --- What workers do. They run in processes that know neither this file nor fakes.py: see ``by_value``.


def begin(config: PrecomputeConfig) -> int:
    """Note that a worker began.

    Returns:
        How often it began before.
    """
    noted = config.shards.with_name(f"worker-{config.worker_index}")
    before = len(noted.read_text().splitlines()) if noted.exists() else 0
    with noted.open("a") as file:
        file.write(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')!r} {Path.cwd()}\n")
    return before


def begun(config: PrecomputeConfig) -> dict[int, list[list[str]]]:
    """Worker to the process, the GPUs and the folder of every time it began."""
    return {
        int(noted.name.partition("-")[2]): [line.split(maxsplit=2) for line in noted.read_text().splitlines()]
        for noted in sorted(config.shards.parent.glob("worker-*"))
    }


def score(config: PrecomputeConfig) -> int:
    begin(config)
    assert config.launcher == "local"
    return work(config, scorer=ScriptedScorer())


def score_slowly(config: PrecomputeConfig) -> int:
    begin(config)
    return work(config, scorer=ScriptedScorer(before_call=lambda calls: time.sleep(1.0)))


def score_and_be_killed_once(config: PrecomputeConfig) -> int:
    first = begin(config) == 0

    def in_the_second_shard(calls: int) -> None:
        if config.worker_index != 1:
            # However slow the machine is: worker 1 finds a second shard, and work when it is back.
            wait_until(lambda: len(begun(config).get(1, [])) == 2, seconds=200)
        elif first and calls == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    return work(config, scorer=ScriptedScorer(before_call=in_the_second_shard))


def score_unless_second(config: PrecomputeConfig) -> int:
    begin(config)
    if config.worker_index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return work(config, scorer=ScriptedScorer())


def refuse_in_the_second(config: PrecomputeConfig) -> int:
    begin(config)
    if config.worker_index == 1:
        raise DataError("row 3 is not UTF-8", where="data.jsonl:4", fix="mend it", kind="encoding")
    time.sleep(240)
    return 0


def fail_once(config: PrecomputeConfig) -> int:
    if begin(config) == 0:
        raise OSError("the disk went away")
    return work(config, scorer=ScriptedScorer())


def always_fail(config: PrecomputeConfig) -> int:
    begin(config)
    raise LookupError("a bug")


# --- Without Ray.


class FakeTask:
    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def remote(self, *arguments: Any) -> Callable[[], Any]:
        return lambda: self._function(*arguments)


class FakeRay:
    """The part of Ray that is used: tasks run here, one after the other, and are never tried again."""

    class exceptions:
        class RayError(Exception):
            pass

    def __init__(self, *nodes: dict[str, float], connected: bool = False) -> None:
        self._nodes = nodes
        self.connected = connected
        self.options_given: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        self.cancelled: list[Any] = []

    def is_initialized(self) -> bool:
        return self.connected

    def init(self, **settings: Any) -> None:
        assert not self.connected
        self.connected, self.settings = True, settings

    def shutdown(self) -> None:
        self.connected = False

    def nodes(self) -> list[dict[str, Any]]:
        dead = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}
        return [{"Alive": True, "Resources": node} for node in self._nodes] + [dead]

    def cluster_resources(self) -> dict[str, float]:
        return dict(sum(map(Counter, self._nodes), Counter()))

    def remote(self, **options: Any) -> Any:
        self.options_given = options
        return FakeTask

    def wait(self, tasks: list[Any], *, num_returns: int = 1, timeout: float | None = None) -> Any:
        return tasks[:num_returns], tasks[num_returns:]

    def get(self, task: Any) -> Any:
        return task()

    def cancel(self, task: Any, *, force: bool) -> None:
        assert force
        self.cancelled.append(task)


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeRay]:
    def install(*nodes: dict[str, float], connected: bool = False) -> FakeRay:
        found = FakeRay(*nodes, connected=connected)
        monkeypatch.setitem(sys.modules, "ray", found)
        return found

    return install


def test_a_missing_ray_is_named_with_the_command_that_installs_it(
    config_of: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="Ray is not installed") as caught:
        run_workers(planned(config_of()), score)
    assert caught.value.fix == "pip install 'dpo-opt[ray]'"


def test_every_worker_has_its_number_and_together_they_do_everything(
    config_of: Configs, fake_ray: Callable[..., FakeRay]
) -> None:
    config = planned(config_of())
    ray = fake_ray({"CPU": 8.0})
    run_workers(config, score)
    assert sorted(begun(config)) == [0, 1, 2, 3]
    assert status(config.shards).shards_committed == SHARDS
    assert (ray.options_given["num_cpus"], ray.options_given["num_gpus"]) == (1, 0)
    assert (ray.settings["address"], ray.connected) == ("local", False)


def test_an_explained_error_comes_unchanged_and_stops_the_others(
    config_of: Configs, fake_ray: Callable[..., FakeRay]
) -> None:
    error = DataError("row 3 is not UTF-8", where="data.jsonl:4", fix="mend it", kind="encoding")

    def refuse(config: PrecomputeConfig) -> int:
        raise error

    ray = fake_ray({"CPU": 8.0})
    with pytest.raises(DataError) as caught:
        run_workers(planned(config_of()), refuse)
    assert caught.value is error
    assert len(ray.cancelled) == 3
    assert not ray.connected


@pytest.mark.parametrize(
    ("address", "environment", "used"),
    [
        (None, None, "local"),
        (None, "ray://a:10001", "ray://a:10001"),
        ("ray://b:10001", "ray://a:10001", "ray://b:10001"),
        ("auto", None, "auto"),
    ],
)
def test_the_setting_wins_over_the_environment_and_both_over_a_cluster_of_this_machine(
    config_of: Configs,
    fake_ray: Callable[..., FakeRay],
    monkeypatch: pytest.MonkeyPatch,
    address: str | None,
    environment: str | None,
    used: str,
) -> None:
    if environment:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    ray = fake_ray({"CPU": 8.0})
    run_workers(planned(config_of(ray_address=address)), score)
    assert ray.settings["address"] == used
    # A cluster that runs already refuses to be told its size.
    assert ("num_cpus" in ray.settings) == (used == "local")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no-such-host.invalid:6379", "somewhere"])
def test_a_cluster_that_does_not_answer_is_named_at_once(
    config_of: Configs, fake_ray: Callable[..., FakeRay], address: str
) -> None:
    ray = fake_ray({"CPU": 8.0})
    with pytest.raises(ConfigError, match="no connection to Ray") as caught:
        run_workers(planned(config_of(ray_address=address)), score)
    assert caught.value.where == address
    assert ray.settings == {}


def test_a_connection_that_was_there_before_is_used_and_kept(
    config_of: Configs, fake_ray: Callable[..., FakeRay]
) -> None:
    ray = fake_ray({"CPU": 8.0}, connected=True)
    run_workers(planned(config_of()), score)
    assert (ray.connected, ray.settings) == (True, {})


@pytest.mark.parametrize(
    ("nodes", "gpus", "message", "fix"),
    [
        ([{"CPU": 8.0}], 1, "0 GPUs and 8 CPUs on 1 node,", "--gpus-per-worker 0"),
        ([{"CPU": 8.0, "GPU": 3.0}], 1, "3 GPUs .* room for 3 of 4 workers", "--num-workers 3"),
        ([{"CPU": 8.0, "GPU": 1.0}] * 8, 2, "8 GPUs .* room for 0 of 4", "--gpus-per-worker 1 or less"),
        ([{"CPU": 8.0, "GPU": 3.0}] * 3, 2, "9 GPUs .* room for 3 of 4", "--num-workers 3"),
        ([{"CPU": 0.0, "GPU": 8.0}], 1, "8 GPUs and 0 CPUs", "one CPU"),
        ([{"GPU": 8.0}], 0, "room for 0 of 4", "one CPU"),
    ],
)
def test_workers_that_do_not_fit_are_refused_before_one_starts(
    config_of: Configs,
    fake_ray: Callable[..., FakeRay],
    nodes: list[dict[str, float]],
    gpus: int,
    message: str,
    fix: str,
) -> None:
    fake_ray(*nodes)
    config = planned(config_of(gpus_per_worker=gpus))
    with pytest.raises(ConfigError, match=message) as caught:
        run_workers(config, score)
    assert fix in str(caught.value.fix)
    assert begun(config) == {}


@pytest.mark.parametrize(
    ("nodes", "gpus"),
    [([{"CPU": 8.0, "GPU": 4.0}] * 2, 2), ([{"CPU": 1.0, "GPU": 1.0}] * 4, 1), ([{"CPU": 1.0}], 0)],
)
def test_workers_that_fit_or_can_take_turns_on_cores_run(
    config_of: Configs, fake_ray: Callable[..., FakeRay], nodes: list[dict[str, float]], gpus: int
) -> None:
    fake_ray(*nodes)
    config = planned(config_of(gpus_per_worker=gpus))
    run_workers(config, score)
    assert len(begun(config)) == 4


def test_a_node_that_does_not_see_the_folder_plans_nothing_of_its_own(
    config_of: Configs, fake_ray: Callable[..., FakeRay]
) -> None:
    fake_ray({"CPU": 8.0})
    config = config_of()
    with pytest.raises(ConfigError, match="does not see the folder") as caught:
        run_workers(config, score)
    assert caught.value.where == str(config.shards)
    assert not config.shards.exists()


def test_results_of_lost_workers_are_missed_only_where_shards_are_left(
    config_of: Configs, fake_ray: Callable[..., FakeRay], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = fake_ray({"CPU": 8.0})
    lost = iter([True, True, True, True, True, False, False, False])

    def get(task: Any) -> Any:
        if next(lost):
            raise ray.exceptions.RayError("The worker died unexpectedly\nand more")
        return task()

    monkeypatch.setattr(ray, "get", get)
    config = planned(config_of())
    with pytest.raises(DpoOptError) as caught:
        run_workers(config, score)
    assert caught.value.what == "worker 0 was lost 6 times: The worker died unexpectedly"
    run_workers(config, score)
    assert status(config.shards).shards_committed == SHARDS


def test_stdout_is_kept_for_results(
    config_of: Configs, fake_ray: Callable[..., FakeRay], capsys: pytest.CaptureFixture[str]
) -> None:
    ray = fake_ray({"CPU": 8.0})

    def report(config: PrecomputeConfig) -> int:
        print("(raylet) a worker died")
        return score(config)

    run_workers(planned(config_of()), report)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "(raylet) a worker died\n" * 4)
    assert ray.settings["log_to_driver"] is False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("during", ["init", "wait", "shutdown"])
def test_a_preempted_run_stops_although_ray_takes_signals_and_drops_what_handlers_raise(
    config_of: Configs,
    fake_ray: Callable[..., FakeRay],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    during: str,
) -> None:
    ray = fake_ray({"CPU": 8.0})
    used = {name: getattr(ray, name) for name in ("init", "wait", "shutdown")}

    def as_ray_does(name: str, *arguments: Any, **named: Any) -> Any:
        if name == "init":
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        if name == during and not ray.cancelled:
            # Its compiled code lets nothing but these two out.
            with contextlib.suppress(Preempted):
                os.kill(os.getpid(), number)
                if name == "wait":
                    return [], arguments[0]
        return used[name](*arguments, **named)

    for name in used:
        monkeypatch.setattr(ray, name, functools.partial(as_ray_does, name))
    config = planned(config_of())
    with preemptible("again"):
        handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}
        with pytest.raises(Preempted, match=number.name) as caught:
            run_workers(config, score)
        assert {n: signal.getsignal(n) for n in handlers} == handlers
    assert caught.value.fix == "again"
    assert not ray.connected
    # What had begun is stopped; where the signal came last, all had ended.
    assert len(ray.cancelled) == (4 if during == "wait" else 0)
    assert len(begun(config)) == (4 if during == "shutdown" else 0)


# --- With Ray.


@pytest.fixture
def by_value(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let workers have the functions of this file, which they cannot import."""
    if importlib.util.find_spec("ray") is None:
        if os.environ.get("DPO_OPT_REQUIRE_RAY") == "1":
            pytest.fail("Ray is not installed, and the environment requires it", pytrace=False)
        pytest.skip("Ray is not installed")
    # Ray's workers give way to everything else; beside other tests they would hardly run.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    from ray import cloudpickle

    modules = [sys.modules[__name__], fakes]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    yield
    for module in modules:
        cloudpickle.unregister_pickle_by_value(module)


def is_running(process: int) -> bool:
    # A zombie has ended; who started it has not asked yet.
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(holds: Callable[[], bool], *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("by_value")
def test_a_killed_worker_is_started_again_and_the_folder_is_that_of_an_undisturbed_run(
    config_of: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = undisturbed(config_of())
    # Relative paths: workers stand in another folder than this process.
    monkeypatch.chdir(tmp_path)
    config = planned(config_of(shards="shards", data="data.jsonl"))
    run_workers(config, score_and_be_killed_once)
    manifest = finalize(config.shards)
    assert (manifest.kept, len(manifest.shards)) == (23, SHARDS)
    assert content(config.shards).equals(expected)
    found = begun(config_of())
    assert {number: len(times) for number, times in found.items()} == {0: 1, 1: 2, 2: 1, 3: 1}
    # Each time in a process of its own, without a GPU, where the run was started.
    processes, gpus, folders = zip(*[time for times in found.values() for time in times], strict=True)
    assert len({*processes, str(os.getpid())}) == 6
    assert set(gpus) == {"''"}
    assert set(folders) == {str(tmp_path)}
    wait_until(lambda: not any(is_running(int(process)) for process in processes), seconds=30)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "worker died" in shown.err


@pytest.mark.slow
@pytest.mark.usefixtures("by_value")
def test_a_worker_that_always_dies_leaves_its_shards_to_the_others(config_of: Configs) -> None:
    config = planned(config_of(num_workers=2))
    run_workers(config, score_unless_second)
    assert {number: len(times) for number, times in begun(config).items()} == {0: 1, 1: 6}
    finalize(config.shards)
    assert content(config.shards).equals(undisturbed(config))


@pytest.mark.slow
@pytest.mark.usefixtures("by_value")
def test_a_data_error_in_a_worker_arrives_as_it_was_raised_at_once_and_is_not_retried(
    config_of: Configs, capfd: pytest.CaptureFixture[str]
) -> None:
    config = planned(config_of(num_workers=2))
    before = time.monotonic()
    with pytest.raises(DataError) as caught:
        run_workers(config, refuse_in_the_second)
    assert time.monotonic() - before < 180  # the other one would have slept for 240 s
    assert type(caught.value) is DataError
    assert vars(caught.value) == {
        "what": "row 3 is not UTF-8",
        "where": "data.jsonl:4",
        "why": None,
        "fix": "mend it",
        "kind": "encoding",
    }
    found = begun(config)
    assert len(found[1]) == 1
    workers = [int(time[0]) for times in found.values() for time in times]
    wait_until(lambda: not any(map(is_running, workers)), seconds=30)
    assert capfd.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.usefixtures("by_value")
def test_any_other_error_is_retried_and_at_last_raised_as_what_it_was(
    config_of: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "_RESTARTS", 2)
    config = planned(config_of(num_workers=1))
    with pytest.raises(LookupError, match="a bug"):
        run_workers(config, always_fail)
    assert len(begun(config)[0]) == 3
    again = planned(config_of(num_workers=2))
    again.shards.with_name("worker-0").unlink()
    run_workers(again, fail_once)
    assert {number: len(times) for number, times in begun(again).items()} == {0: 2, 1: 2}
    assert status(again.shards).shards_committed == SHARDS


@pytest.mark.slow
@pytest.mark.usefixtures("by_value")
def test_a_lost_nodes_worker_goes_on_elsewhere_and_a_running_cluster_is_left_running(
    config_of: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray.cluster_utils import Cluster

    # Nodes that claim a GPU do not start where none is visible.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        _, lost = (cluster.add_node(num_cpus=1, num_gpus=1) for _ in range(2))
        config = planned(config_of(num_workers=2, gpus_per_worker=1, ray_address=cluster.address))

        def lose_a_node() -> None:
            wait_until(lambda: len(begun(config)) == 2, seconds=120)
            cluster.remove_node(lost, allow_graceful=False)

        thread = threading.Thread(target=lose_a_node)
        thread.start()
        run_workers(config, score_slowly)
        thread.join()
        finalize(config.shards)
        assert content(config.shards).equals(undisturbed(config))
        found = begun(config)
        assert sorted(len(times) for times in found.values()) == [1, 2]
        assert {time[1] for times in found.values() for time in times} == {"'0'"}

        with pytest.raises(ConfigError, match="the cluster has 1 GPU and 1 CPU on 2 nodes") as caught:
            run_workers(config, score)
        assert caught.value.fix == "pass --num-workers 1"

        assert not ray.is_initialized()
        ray.init(address=cluster.address, log_to_driver=False)
        assert ray.cluster_resources()["GPU"] == 1
        ray.shutdown()
    finally:
        cluster.shutdown()


CHILD = """
import os, signal, sys, time
from pathlib import Path
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.workers.ray_cluster import run_workers
from dpo_opt.preemption import preemptible
from dpo_opt.schemas.errors import Interrupted, Preempted

def sleep(config):
    config.shards.with_name(f"worker-{config.worker_index}").write_text(f"{os.getpid()} '' .\\n")
    time.sleep(600)
    return 0

config = PrecomputeConfig.model_validate_json(sys.argv[1])
try:
    with preemptible("again"):
        run_workers(config, sleep)
except (Interrupted, Preempted) as error:
    sys.exit(error.exit_code)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("by_value")
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, Interrupted.exit_code), (signal.SIGTERM, Preempted.exit_code)],
    ids=["INT", "TERM"],
)
def test_an_interrupted_run_stops_its_workers_and_its_cluster(
    config_of: Configs, number: signal.Signals, code: int
) -> None:
    config = planned(config_of(num_workers=2))
    command = [sys.executable, "-c", CHILD, config.model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            wait_until(lambda: len(begun(config)) == 2 or child.poll() is not None, seconds=120)
            time.sleep(0.2)
            child.send_signal(number)
            out, err = child.communicate(timeout=90)
        finally:
            child.kill()
    assert (child.returncode, out) == (code, ""), err
    workers = [int(times[0][0]) for times in begun(config).values()]
    assert len(workers) == 2
    wait_until(lambda: not any(map(is_running, workers)), seconds=30)


@pytest.mark.slow
@pytest.mark.usefixtures("by_value")
def test_the_command_scores_with_ray_and_prints_its_result_only(
    tiny_model: Path, tmp_path: Path, config_of: Configs
) -> None:
    write_jsonl(tmp_path / "data.jsonl", ROWS[:20])

    def run(shards: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [
            *(sys.executable, "-m", "dpo_opt", "precompute", "--model", str(tiny_model), "--backend", "hf"),
            *("--data", "data.jsonl", "--shards", shards, "--pairs-per-shard", "4", "--json", *options),
        ]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    with_ray = run("ray", "--launcher", "ray", "--num-workers", "2", "--gpus-per-worker", "0")
    assert (with_ray.returncode, with_ray.stderr) == (0, "")
    result = json.loads(with_ray.stdout)
    assert (result["shards_total"], result["pairs_total"], result["kept"]) == (5, 20, 19)
    assert run("alone").returncode == 0
    ours, alone = content(tmp_path / "ray"), content(tmp_path / "alone")
    for name in ours.column_names:
        if "logps" not in name:
            assert ours[name].equals(alone[name])
    # Threads differ, and with them the order in which a matrix product is summed.
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert ours[name].to_pylist() == pytest.approx(alone[name].to_pylist(), abs=1e-4)

    asked_for_gpus = run("gpus", "--launcher", "ray", "--num-workers", "2")
    assert (asked_for_gpus.returncode, asked_for_gpus.stdout) == (2, "")
    assert "the cluster has 0 GPUs and 2 CPUs" in asked_for_gpus.stderr
    assert "--gpus-per-worker 0" in asked_for_gpus.stderr
