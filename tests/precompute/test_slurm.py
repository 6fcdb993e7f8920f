import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from fakes import ScriptedScorer, preference_rows, write_jsonl
from processes import until
from slurm_cluster import Cluster, fake_command, running_cluster

from dpo_opt.launch import launch
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.run import precompute
from dpo_opt.precompute.shards.reference import make_tokenizer, resolve_reference
from dpo_opt.precompute.shards.status import status
from dpo_opt.precompute.shards.write_plan import settle_plan
from dpo_opt.precompute.workers.slurm import launch_array
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.manifest import COMMAND, COMMITS
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.scorers import make_scorer

Configs = Callable[..., PrecomputeConfig]

ODD = "a b%A 'c' \"d\" #e $HOME;"
"""A folder name with everything that a shell or sbatch could take for something else."""


@pytest.fixture
def config_of(tmp_path: Path) -> Configs:
    def config(**settings: Any) -> PrecomputeConfig:
        values = {
            "model": "model",
            "data": "data.jsonl",
            "shards": tmp_path / "shards",
            "launcher": "slurm",
            "num_workers": 4,
            "gpus_per_worker": 0,
        }
        return PrecomputeConfig.model_validate(values | settings)

    return config


def scripts(config: PrecomputeConfig) -> tuple[Path, Path]:
    return config.shards / "slurm" / "score.sbatch", config.shards / "slurm" / "finalize.sbatch"


def directives(script: Path) -> list[str]:
    """What sbatch reads: the lines before the first command."""
    head = script.read_text().split("\n\n")[0].splitlines()
    assert head[0] == "#!/bin/bash"
    return [line.removeprefix("#SBATCH ") for line in head[1:]]


def test_the_array_has_one_restartable_task_per_worker(config_of: Configs, tmp_path: Path) -> None:
    config = config_of(time_limit="02:00:00")
    result = launch_array(config)
    assert not result["submitted"]
    score, finalize = scripts(config)
    logs = tmp_path / "shards" / "slurm" / "logs"
    assert sorted(directives(score)) == [
        "--array=0-3",
        "--job-name=dpo-opt-score",
        "--ntasks=1",
        "--open-mode=append",
        f"--output={logs}/score-%A_%a.log",
        "--requeue",
        "--signal=B:USR1@120",
        "--time=02:00:00",
    ]
    assert sorted(directives(finalize)) == [
        "--job-name=dpo-opt-finalize",
        "--ntasks=1",
        "--open-mode=append",
        f"--output={logs}/finalize-%j.log",
        "--requeue",
        "--time=02:00:00",
    ]
    # sbatch makes no folder for a log: the job would fail at once.
    assert logs.is_dir()


def test_job_options_reach_both_jobs_and_gpus_only_the_workers(config_of: Configs) -> None:
    options = [
        "partition=gpu",
        "account=x",
        "cpus-per-task=4",
        "constraint=a100&nvlink",
        "comment=a \"b\\' c",
    ]
    config = config_of(job_option=options, gpus_per_worker=2)
    launch_array(config)
    expected = [
        "--partition=gpu",
        "--account=x",
        "--cpus-per-task=4",
        '--constraint="a100&nvlink"',
        '--comment="a \\"b\\\\\' c"',
    ]
    for script in scripts(config):
        assert [line for line in directives(script) if line in expected] == expected
    score, finalize = map(directives, scripts(config))
    assert "--gres=gpu:2" in score
    assert not any(line.startswith("--g") for line in finalize)


def test_whoever_names_the_gpus_is_not_overruled(config_of: Configs) -> None:
    for option in ("gres=gpu:a100:1", "gpus-per-node=1"):
        config = config_of(job_option=[option], gpus_per_worker=1)
        launch_array(config)
        score, finalize = map(directives, scripts(config))
        assert [line for line in score if line.startswith("--g")] == [f"--{option}"]
        assert not any(line.startswith("--g") for line in finalize)


def test_a_worker_without_gpus_asks_for_none(config_of: Configs) -> None:
    config = config_of()
    launch_array(config)
    assert not any(line.startswith("--g") for line in directives(scripts(config)[0]))


@pytest.mark.parametrize("folder", ["shards", ODD])
def test_the_scripts_are_bash_and_run_this_environment(
    config_of: Configs, tmp_path: Path, folder: str
) -> None:
    config = config_of(shards=tmp_path / folder)
    launch_array(config)
    score, finalize = scripts(config)
    for script in (score, finalize):
        subprocess.run(["bash", "-n", script], check=True)
    (line,) = (line for line in score.read_text().splitlines() if line.startswith("command="))
    said = subprocess.run(
        ["bash", "-c", f'{line}; printf "%s\\0" "${{command[@]}}"'],
        capture_output=True,
        text=True,
        check=True,
    )
    python = [sys.executable, "-P", "-m", "dpo_opt"]
    (settings,) = (config.shards / "slurm").glob("settings-*.yaml")
    assert said.stdout.split("\0")[:-1] == [*python, "precompute", "--config", str(settings)]
    last = finalize.read_text().splitlines()[-1]
    assert shlex.split(last) == ["exec", *python, "finalize", "--shards", str(config.shards)]
    assert (config.shards / "slurm" / "logs").is_dir()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("partition=gpu\n#SBATCH --uid=0", "not of the form"),
        ("partition=gpu\r", "not of the form"),
        ("partition", "not of the form"),
        ("partition=", "not of the form"),
        ("--partition=gpu", "not of the form"),
        ("Partition=gpu", "not of the form"),
        ("a b=c", "not of the form"),
        ("=c", "not of the form"),
        ("array=0-9", "--num-workers"),
        ("time=1", "--time-limit"),
        ("signal=KILL", "sets signal itself"),
        ("output=/dev/null", "sets output itself"),
        ("dependency=singleton", "sets dependency itself"),
    ],
)
def test_an_option_that_would_break_the_scripts_is_refused(
    config_of: Configs, option: str, message: str
) -> None:
    config = config_of(job_option=["account=x", option])
    with pytest.raises(ConfigError, match=message) as caught:
        launch_array(config)
    assert repr(option) in caught.value.what
    assert not config.shards.exists()


@pytest.mark.parametrize(
    ("limit", "notice"),
    [
        ("04:00:00", 120),
        ("1-0", 120),
        ("1-00:30", 120),
        ("2-00:00:00", 120),
        ("90", 120),
        ("2", 60),
        ("1:30", 45),
        ("00:01:00", 30),
    ],
)
def test_the_warning_comes_before_the_limit(config_of: Configs, limit: str, notice: int) -> None:
    config = config_of(time_limit=limit)
    launch_array(config)
    assert {f"--time={limit}", f"--signal=B:USR1@{notice}"} <= set(directives(scripts(config)[0]))


@pytest.mark.parametrize("limit", ["", "0", "UNLIMITED", "4h", "1:2:3:4", "-1", "1-", "04:00:00\n", "٣"])
def test_a_time_limit_that_sbatch_would_not_read_is_refused(config_of: Configs, limit: str) -> None:
    with pytest.raises(ConfigError, match="no time limit"):
        launch_array(config_of(time_limit=limit))


@pytest.mark.parametrize("name", ["two\nlines", "back\\slash"])
def test_a_folder_that_no_directive_can_name_is_refused(
    config_of: Configs, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ConfigError, match="cannot be named"):
        launch_array(config_of(shards=tmp_path / name))


def test_the_workers_settings_do_not_launch_again(
    config_of: Configs, tiny_model: Path, tmp_path: Path
) -> None:
    config = config_of(
        model=str(tiny_model),
        data=write_jsonl(tmp_path / "data.jsonl", preference_rows(4)),
        pairs_per_shard=2,
        gpus_per_worker=3,
        submit=True,
        job_option=["partition=gpu"],
        time_limit="1",
    )
    reference = resolve_reference(config)
    tokenizer = make_tokenizer(config, reference)
    settle_plan(config, reference=reference, tokenizer=tokenizer, numerics=ScriptedScorer().numerics)
    launch_array(config.model_copy(update={"submit": False, "time_limit": "9"}))
    expected = {
        "data": [str(tmp_path / "data.jsonl")],
        "model": str(tiny_model),
        "shards": str(config.shards),
        "pairs_per_shard": 2,
    }
    for file in (config.shards / COMMAND, settings_of(config)):
        assert yaml.safe_load(file.read_text()) == expected


def settings_of(config: PrecomputeConfig) -> Path:
    """The file that the tasks of a launch read."""
    command = next(
        line for line in scripts(config)[0].read_text().splitlines() if line.startswith("command=")
    )
    return Path(shlex.split(command.removeprefix("command=(").removesuffix(")"))[-1])


def test_each_launch_carries_its_own_settings(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another setting, a copied folder, data that moved, a pattern that means something here only."""
    (tmp_path / "parts").mkdir()
    write_jsonl(tmp_path / "parts" / "a.jsonl", preference_rows(4))
    monkeypatch.chdir(tmp_path)

    def launched(**settings: Any) -> Path:
        values = {"model": str(tiny_model), "data": "parts/*.jsonl", "shards": "shards", "backend": "hf"}
        values |= {"launcher": "slurm", "num_workers": 2, "gpus_per_worker": 0}
        config = PrecomputeConfig.model_validate(values | settings)
        launch(config)
        found = settings_of(config)
        assert yaml.safe_load((config.shards / COMMAND).read_text()) == yaml.safe_load(found.read_text())
        return found

    def says(file: Path) -> dict[str, Any]:
        found = yaml.safe_load(file.read_text())
        assert isinstance(found, dict)
        return found

    first = launched()
    assert says(first)["data"] == [str(tmp_path / "parts" / "*.jsonl")]
    second = launched(on_bad_row="skip")
    assert (says(second)["on_bad_row"], "on_bad_row" in says(first)) == ("skip", False)
    (tmp_path / "parts").rename(tmp_path / "moved")
    assert says(launched(data="moved"))["data"] == [str(tmp_path / "moved")]
    shutil.copytree(tmp_path / "shards", tmp_path / "copy")
    assert says(launched(data="moved", shards="copy"))["shards"] == str(tmp_path / "copy")
    assert says(first)["shards"] == str(tmp_path / "shards")


# What sbatch, squeue and scontrol would do, and a worker of a few milliseconds.


@pytest.fixture
def path_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Puts a command on the PATH; what it is called with is listed in the file that is returned."""
    folder = tmp_path / "bin"
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return partial(fake_command, folder)


Commands = Callable[[str, str], Path]


@pytest.mark.parametrize(("first", "id_"), [("17", "17"), ("17;blue", "17"), ("Welcome to blue.\n17", "17")])
def test_finalize_is_submitted_behind_the_array(
    config_of: Configs, path_of: Commands, first: str, id_: str
) -> None:
    body = f"""case "$*" in *afterany*) echo 18;; *) printf '%s\\n' {shlex.quote(first)};; esac"""
    called = path_of("sbatch", body)
    config = config_of(submit=True)
    result = launch_array(config)
    assert (result["submitted"], result["array_job"], result["finalize_job"]) == (True, id_, "18")
    score, finalize = scripts(config)
    assert called.read_text().splitlines() == [
        f"--parsable {score}",
        f"--parsable --dependency=afterany:{id_} {finalize}",
    ]


def test_a_second_array_is_not_submitted_while_the_first_is_there(
    config_of: Configs, path_of: Commands, tmp_path: Path
) -> None:
    called = path_of("sbatch", "echo 17")
    states = tmp_path / "states"
    path_of("squeue", f'case "$*" in *--jobs=17*) cat {states};; esac')
    config = config_of(submit=True)
    states.write_text("PENDING\nRUNNING\n")
    launch_array(config)
    with pytest.raises(
        ConfigError, match=r"job 17 of this folder is there already \(PENDING, RUNNING\)"
    ) as e:
        launch_array(config)
    assert "scancel 17" in str(e.value.fix)
    assert len(called.read_text().splitlines()) == 2
    states.write_text("")
    launch_array(config)
    assert len(called.read_text().splitlines()) == 4


def test_the_commands_that_are_shown_do_the_same(
    config_of: Configs, path_of: Commands, tmp_path: Path
) -> None:
    called = path_of("sbatch", "echo '17;blue'")
    config = config_of(shards=tmp_path / ODD)
    result = launch_array(config)
    assert called.read_text() == ""
    subprocess.run(["bash", "-euc", "; ".join(result["commands"])], check=True, stdout=subprocess.DEVNULL)
    score, finalize = scripts(config)
    assert called.read_text().splitlines() == [f"--parsable {score}", f"--dependency=afterany:17 {finalize}"]


def test_what_sbatch_refuses_is_shown_in_its_words(config_of: Configs, path_of: Commands) -> None:
    path_of("sbatch", "echo 'sbatch: error: invalid partition specified: gpux' >&2; exit 1")
    config = config_of(submit=True, job_option=["partition=gpux"])
    with pytest.raises(ConfigError, match=r"\(exit code 1\): invalid partition specified: gpux") as caught:
        launch_array(config)
    assert caught.value.where == str(scripts(config)[0])


def test_an_array_without_its_finalize_is_named(config_of: Configs, path_of: Commands) -> None:
    path_of("sbatch", 'case "$*" in *afterany*) echo full >&2; exit 1;; *) echo 17;; esac')
    with pytest.raises(ConfigError, match="job 17") as caught:
        launch_array(config_of(submit=True))
    assert "dpo-opt finalize --shards" in str(caught.value.fix)


def test_without_sbatch_nothing_is_submitted_or_written(
    config_of: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="no sbatch") as caught:
        launch_array(config_of(submit=True))
    assert "leave out --submit" in str(caught.value.fix)
    assert not config_of().shards.exists()
    assert len(launch_array(config_of())["commands"]) == 2


COMMITTING = f'touch "$(dirname "$6")/../{COMMITS}/00000-aa.json"; '
WAITING = 'touch "$READY"; while :; do sleep 0.05; done'
STOPPED = "trap 'exit 75' TERM USR1; "
# The worker, the signal that the script gets, the state of the task; exit code, and whether it is requeued.
ENDS = {
    "finished": ("exit 0", None, "RUNNING", 0, False),
    "bad_data": ("exit 3", None, "RUNNING", 3, False),
    "out_of_memory": ("kill -9 $$", None, "RUNNING", 137, False),
    "signalled_by_itself": ("exit 75", None, "RUNNING", 75, True),
    "preempted_by_a_signal": (STOPPED + WAITING, "TERM", "RUNNING", 75, True),
    "preempted_while_it_imports": (WAITING, "TERM", "RUNNING", 75, True),
    "cancelled_or_requeued_already": (STOPPED + WAITING, "TERM", "COMPLETING", 75, False),
    "unknown_to_slurm": (STOPPED + WAITING, "TERM", "", 75, False),
    "out_of_time": (STOPPED + COMMITTING + WAITING, "USR1", "RUNNING", 75, True),
    "out_of_time_with_nothing_done": (STOPPED + WAITING, "USR1", "RUNNING", 75, False),
    "warned_long_before_its_limit": (STOPPED + WAITING, "USR1", "RUNNING", 75, True),
    "finished_all_the_same": (f"trap 'exit 0' TERM; {WAITING}", "TERM", "RUNNING", 0, False),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_task_is_run_again_only_if_it_was_stopped(
    config_of: Configs, path_of: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    worker, sent, state, code, requeued = ENDS[end]
    path_of("python-of-this-test", worker)
    path_of("squeue", f"echo {state}")
    asked = path_of("scontrol", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python-of-this-test"))
    ready = tmp_path / "ready"
    config = config_of(time_limit="1" if end.startswith("out_of_time") else "04:00:00")
    launch_array(config)
    (config.shards / COMMITS).mkdir()
    environment = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3", "READY": str(ready)}
    with subprocess.Popen(
        ["bash", scripts(config)[0]], env=os.environ | environment, stderr=subprocess.PIPE, text=True
    ) as script:
        if sent:
            until(ready.exists, seconds=20)
            # To the script alone, as --signal=B: does it.
            script.send_signal(signal.Signals[f"SIG{sent}"])
        _, said = script.communicate(timeout=20)
    assert script.returncode == code
    assert asked.read_text() == ("requeue 17_3\n" if requeued else "")
    assert ("no shard was finished" in said) == (end == "out_of_time_with_nothing_done")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with running_cluster(tmp_path / "slurm") as made:
        yield made


# Imported by every Python of a job before anything else: each shard takes long enough to be stopped in it.
SLOWLY = """\
import time
from dpo_opt.precompute import run

score = run.score_pairs

def slowly(pairs, scorer, **options):
    print("began row", pairs[0].row, flush=True)
    time.sleep(3)
    return score(pairs, scorer, **options)

run.score_pairs = slowly
"""


def content(shards: Path) -> list[dict[str, Any]]:
    """Every pair of a folder as plain values."""
    return [
        {name: str(getattr(p, name)) for name in p.__dataclass_fields__}
        for p in ShardFolder.open(shards).pairs()
    ]


@pytest.mark.slow
def test_a_slurm_array_survives_what_happens_to_its_tasks(
    cluster: Cluster, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", preference_rows(60))
    settings = {"model": str(tiny_model), "data": data, "backend": "hf", "pairs_per_shard": 5}
    local = PrecomputeConfig.model_validate(settings | {"shards": tmp_path / "local"})
    precompute(local, scorer=make_scorer(local))
    (tmp_path / "slowly").mkdir()
    (tmp_path / "slowly" / "sitecustomize.py").write_text(SLOWLY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "slowly"))
    config = PrecomputeConfig.model_validate(
        settings
        | {
            "shards": tmp_path / ODD,
            "launcher": "slurm",
            "num_workers": 4,
            "gpus_per_worker": 0,
            "submit": True,
            "job_option": ["partition=main", "comment=a \"b\" \\ 'c' #d"],
        }
    )
    started = time.monotonic()
    launched = launch(config)
    array, last = launched["array_job"], launched["finalize_job"]
    assert cluster.say("squeue", "-h", "-j", last, "-o", "%k") == "a \"b\" \\ 'c' #d"
    logs = [config.shards / "slurm" / "logs" / f"score-{array}_{i}.log" for i in range(4)]

    disturb = {
        1: ("scancel", "--batch", "--signal=TERM"),
        2: ("scontrol", "requeue"),
        3: ("scancel",),
    }

    def disturb_whoever_has_begun() -> bool:
        for task in list(disturb):
            if logs[task].is_file() and "began row" in logs[task].read_text():
                cluster.say(*disturb.pop(task), f"{array}_{task}")
        return not disturb

    until(disturb_whoever_has_begun, seconds=120)
    until(lambda: not cluster.say("squeue", "-h"), seconds=180)
    took = time.monotonic() - started

    tasks = [cluster.job(f"{array}_{i}") for i in range(4)]
    assert [(t["JobState"], t["Restarts"]) for t in tasks] == [
        ("COMPLETED", "0"),
        ("COMPLETED", "1"),
        ("COMPLETED", "1"),
        ("CANCELLED", "0"),
    ]
    assert (cluster.job(last)["JobState"], cluster.job(last)["ExitCode"]) == ("COMPLETED", "0:0")
    assert cluster.job(last)["StartTime"] >= max(t["EndTime"] for t in tasks)
    assert content(config.shards) == content(local.shards)
    # The three that were disturbed were in the middle of a shard, and nothing else was begun for nothing.
    said = [log.read_text() for log in logs]
    attempts = len(list((config.shards / COMMITS).glob("*.json")))
    assert sum(text.count("began row") for text in said) == attempts + 3
    assert "stopped by SIGTERM" in said[1]
    assert not list(config.shards.rglob("*.tmp"))
    print(
        f"slurm: {status(config.shards).shards_total} shards by 4 tasks; one was signalled, one requeued and "
        f"one cancelled in the middle of a shard: finalized in {took:.0f} s, {attempts} commits"
    )

    before = {p: p.stat().st_mtime_ns for p in config.shards.rglob("*") if p.is_file()}
    again = launch(config)
    assert again["finalized"]
    assert "array_job" not in again
    assert cluster.say("squeue", "-h") == ""
    assert {p: p.stat().st_mtime_ns for p in config.shards.rglob("*") if p.is_file()} == before
