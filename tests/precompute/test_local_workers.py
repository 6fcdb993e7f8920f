import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fakes import preference_rows, write_jsonl
from processes import alive, until

from dpo_opt.cli import main
from dpo_opt.launch import take_place
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.workers.local import own_devices, visible_devices, worker_environments
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.manifest import MANIFEST
from dpo_opt.schemas.shard_folder import ShardFolder

EIGHT = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}


def config_of(**settings: Any) -> PrecomputeConfig:
    return PrecomputeConfig.model_validate({"model": "m", "data": "d", "shards": "s", **settings})


@pytest.mark.parametrize(
    ("named", "devices"),
    [
        ("0,1", ["0", "1"]),
        ("3", ["3"]),
        (" GPU-a , MIG-b/1/0", ["GPU-a", "MIG-b/1/0"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
    ],
)
def test_devices_are_those_that_the_environment_names(named: str, devices: list[str]) -> None:
    assert visible_devices({"CUDA_VISIBLE_DEVICES": named}) == devices


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({"num_workers": 4, "gpus_per_worker": 2}, ["0,1", "2,3", "4,5", "6,7"]),
        ({"num_workers": 2, "gpus_per_worker": 4}, ["0,1,2,3", "4,5,6,7"]),
        ({"num_workers": 3, "gpus_per_worker": 1}, ["0", "1", "2"]),
        ({"num_workers": 2}, ["0", "1"]),
    ],
)
def test_each_worker_has_gpus_of_its_own(settings: dict[str, Any], shares: list[str]) -> None:
    found = worker_environments(config_of(**settings), EIGHT, cores=64)
    assert found == [{"CUDA_VISIBLE_DEVICES": share} for share in shares]


@pytest.mark.parametrize(
    ("settings", "environment", "threads"),
    [
        ({"num_workers": 2}, {"CUDA_VISIBLE_DEVICES": ""}, "8"),
        ({"num_workers": 3}, {"CUDA_VISIBLE_DEVICES": ""}, "5"),
        ({"num_workers": 32}, {"CUDA_VISIBLE_DEVICES": ""}, "1"),
        ({"num_workers": 2}, {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "6"}, "3"),
        # GPUs are there, and not asked for.
        ({"num_workers": 2, "gpus_per_worker": 0}, EIGHT, "8"),
    ],
)
def test_workers_without_gpus_share_the_cores(
    settings: dict[str, Any], environment: dict[str, str], threads: str
) -> None:
    found = worker_environments(config_of(**settings), environment, cores=16)
    assert found == [{"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": threads}] * settings["num_workers"]


@pytest.mark.parametrize(
    ("settings", "named", "fix"),
    [
        ({"num_workers": 5, "gpus_per_worker": 2}, "0,1,2,3,4,5,6,7", "pass --num-workers 4"),
        ({"num_workers": 2, "gpus_per_worker": 4}, "0,1", "pass --gpus-per-worker 2 and --num-workers 1"),
        ({"num_workers": 2, "gpus_per_worker": 1}, "", "pass --gpus-per-worker 0 to score on the cores"),
        ({"num_workers": 3}, "0,1", "pass --num-workers 2"),
    ],
)
def test_too_few_gpus_are_refused_with_what_would_fit(settings: dict[str, Any], named: str, fix: str) -> None:
    with pytest.raises(ConfigError, match="in all, this machine has") as caught:
        worker_environments(config_of(**settings), {"CUDA_VISIBLE_DEVICES": named}, cores=4)
    assert caught.value.fix == fix


@pytest.mark.parametrize(
    ("settings", "environment", "share"),
    [
        ({"gpus_per_worker": 2}, {"LOCAL_RANK": "1", **EIGHT}, "2,3"),
        ({"gpus_per_worker": 2}, {"SLURM_LOCALID": "3", **EIGHT}, "6,7"),
        ({"gpus_per_worker": 1}, {"LOCAL_RANK": "0", "SLURM_LOCALID": "5", **EIGHT}, "0"),
        # Nobody said how many, the scheduler has divided them already, or nobody numbered this process.
        ({}, {"LOCAL_RANK": "1", **EIGHT}, None),
        ({"gpus_per_worker": 2}, {"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "4,5"}, None),
        ({"gpus_per_worker": 2}, EIGHT, None),
    ],
)
def test_a_scheduled_worker_takes_the_gpus_of_its_place(
    settings: dict[str, Any], environment: dict[str, str], share: str | None
) -> None:
    assert own_devices(config_of(**settings), environment) == share


def test_a_place_without_gpus_is_refused() -> None:
    with pytest.raises(ConfigError, match="worker 2 of this machine needs 3 GPUs") as caught:
        own_devices(config_of(gpus_per_worker=3), {"LOCAL_RANK": "2", **EIGHT})
    assert "start 2 workers" in str(caught.value.fix)


def test_a_numbered_process_is_one_worker_and_starts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **EIGHT})
    worker = take_place(config_of(gpus_per_worker=2))
    assert (worker.worker_index, worker.num_workers, worker.launched) == (5, 8, False)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"
    with pytest.raises(ConfigError, match="start workers in each of 8"):
        take_place(config_of(num_workers=4))
    monkeypatch.setattr(os, "environ", {})
    with pytest.raises(ConfigError, match="--gpus-per-worker without workers"):
        take_place(config_of(gpus_per_worker=2))
    assert take_place(config_of(num_workers=4)).launched
    assert not take_place(config_of()).launched


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (
            ["--worker-index", "3", "--num-workers", "2"],
            "--worker-index 3 is not below --num-workers 2",
            "pass a --worker-index from 0 to 1",
        ),
        (["--worker-index", "0"], "--worker-index needs --num-workers", "pass --num-workers"),
        (["--launcher", "slurm"], "--launcher slurm needs --num-workers", "pass --num-workers"),
        (
            ["--launcher", "ray", "--worker-index", "0", "--num-workers", "2"],
            "--worker-index is for one worker, and --launcher ray starts all of them",
            "leave --worker-index out",
        ),
    ],
)
@pytest.mark.parametrize("in_a_file", [False, True])
def test_settings_that_do_not_go_together_are_named_as_they_are_typed(
    tmp_path: Path, arguments: list[str], what: str, fix: str, in_a_file: bool
) -> None:
    given = ["--model", "m", "--data", "d", "--shards", str(tmp_path / "s")]
    if in_a_file:
        (tmp_path / "run.yaml").write_text("".join(f"{pair(arguments[i : i + 2])}\n" for i in (0, 2, 4)))
        arguments = ["--config", str(tmp_path / "run.yaml")]
    result = CliRunner().invoke(main, ["precompute", *given, *arguments])
    first, *_, last = result.stderr.splitlines()
    assert (result.exit_code, first, last) == (2, f"error: {what}", f"  fix: {fix}")
    assert not [name for name in PrecomputeConfig.model_fields if "_" in name and name in result.stderr]


def pair(arguments: list[str]) -> str:
    """An option and its value as a line of YAML."""
    return ": ".join(arguments).removeprefix("--").replace("-", "_")


@pytest.mark.parametrize("launcher", ["local", "slurm", "ray"])
@pytest.mark.parametrize(
    ("name", "values", "owner"),
    [
        ("--submit", [], "slurm"),
        ("--job-option", ["partition=gpu"], "slurm"),
        ("--time-limit", ["01:00:00"], "slurm"),
        ("--ray-address", ["auto"], "ray"),
    ],
)
def test_an_option_of_another_launcher_is_refused_by_name(
    tmp_path: Path, launcher: str, name: str, values: list[str], owner: str
) -> None:
    given = ["--model", "m", "--data", "d", "--shards", str(tmp_path / "s"), "--num-workers", "2"]
    result = CliRunner().invoke(main, ["precompute", *given, "--launcher", launcher, name, *values])
    assert result.exit_code != 0
    refused = [
        f"error: {name} is an option of --launcher {owner}",
        f"  why: with --launcher {launcher} it would have no effect",
        f"  fix: leave {name} out",
    ]
    assert (result.stderr.splitlines() == refused) == (launcher != owner)
    if launcher == "local":
        result = CliRunner().invoke(main, ["precompute", *given, name, *values])
        assert result.stderr.splitlines() == [*refused[:2], f"  fix: pass --launcher {owner}"]


# Every worker imports this before anything else: scores without a model, and writes down where.
SCRIPTED = """
import json, os, sys, time
if "precompute" in sys.argv:
    import dpo_opt.scorers
    from fakes import ScriptedScorer

    def told(calls):
        line = [os.getpid(), os.environ.get("OMP_NUM_THREADS"), os.environ.get("CUDA_VISIBLE_DEVICES")]
        with open(os.environ["TOLD"], "a") as file:
            file.write(json.dumps(line) + "\\n")
        time.sleep(float(os.environ["SECONDS_A_SHARD"]))
        number = sys.argv.index("--worker-index") + 1 if "--worker-index" in sys.argv else 0
        if number and sys.argv[number] in os.environ["DIES"]:
            os.kill(os.getpid(), 9)

    dpo_opt.scorers.make_scorer = lambda config: ScriptedScorer(before_call=told)
"""

Command = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tiny_model: Path, tmp_path: Path) -> Iterator[Command]:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SCRIPTED)
    data = write_jsonl(tmp_path / "data.jsonl", preference_rows(24))
    begun: list[subprocess.Popen[str]] = []

    def command(*more: object, seconds: float = 0.0, dies: str = "") -> subprocess.Popen[str]:
        arguments = ["--model", tiny_model, "--data", data, "--shards", tmp_path / "shards"]
        arguments += ["--pairs-per-shard", 3, "--json", *more]
        process = subprocess.Popen(
            [sys.executable, "-m", "dpo_opt", "precompute", *map(str, arguments)],
            env={
                **{k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"},
                "PYTHONPATH": f"{tmp_path / 'site'}:{Path(__file__).resolve().parents[1]}",
                "CUDA_VISIBLE_DEVICES": "",
                "TOLD": str(tmp_path / "told"),
                "SECONDS_A_SHARD": str(seconds),
                "DIES": dies,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        begun.append(process)
        return process

    yield command
    for process in begun:
        process.kill()
        process.communicate()


def told(tmp_path: Path) -> list[list[Any]]:
    file = tmp_path / "told"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_workers_of_this_machine_score_everything(start: Command, tmp_path: Path) -> None:
    process = start("--launcher", "local", "--num-workers", 2, seconds=0.3)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    result = json.loads(out)
    assert (result["kept"], result["shards_total"]) == (24, 8)
    assert sum(result["scored_shards"]) >= 8
    assert len(list(ShardFolder.open(tmp_path / "shards").pairs())) == 24
    lines = told(tmp_path)
    # Two processes, neither of them the launcher, each with its share of the cores and no GPU.
    assert len({pid for pid, *_ in lines}) == 2
    assert process.pid not in {pid for pid, *_ in lines}
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert {(omp, cuda) for _, omp, cuda in lines} == {(threads, "")}
    assert {line.partition(":")[0] for line in err.splitlines() if line} <= {"worker 0", "worker 1"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_launcher(start: Command, tmp_path: Path, number: signal.Signals) -> None:
    process = start("--num-workers", 2, seconds=60)
    until(lambda: len({pid for pid, *_ in told(tmp_path)}) == 2, seconds=60)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    if number == signal.SIGTERM:
        assert process.returncode == 75, err
        assert "fix: dpo-opt precompute --model" in err
    until(lambda: not any(alive(pid) for pid, *_ in told(tmp_path)), seconds=5)
    assert not (tmp_path / "shards" / MANIFEST).exists()


@pytest.mark.slow
def test_a_worker_that_dies_leaves_its_shards_to_the_other(start: Command, tmp_path: Path) -> None:
    process = start("--num-workers", 2, seconds=3, dies="1")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert json.loads(out)["scored_shards"] == [8]
    assert len(list(ShardFolder.open(tmp_path / "shards").pairs())) == 24


@pytest.mark.slow
def test_when_all_workers_die_the_run_fails_and_goes_on_later(start: Command) -> None:
    process = start("--num-workers", 2, dies="01")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "8 of 8 shards are not scored: worker 0 with -9, worker 1 with -9" in err
    assert "Traceback" not in err
    again = start("--num-workers", 1)
    again.communicate(timeout=100)
    assert again.returncode == 0


@pytest.mark.slow
def test_what_one_worker_is_refused_stops_all(start: Command, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    process = start("--num-workers", 2, seconds=2)
    # Planned, and no worker has read a row yet: each starts by loading this program.
    until(lambda: (tmp_path / "shards" / "plan.json").is_file(), seconds=120)
    # In one step: half a file would be refused too, for another reason.
    changed = tmp_path / "changed.jsonl"
    changed.write_text(data.read_text().replace("The answer is 1", "The reply is 1"))
    changed.replace(data)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 3, err
    assert "changed while the file was being scored" in err
    assert "was refused, and the others would be" in err
