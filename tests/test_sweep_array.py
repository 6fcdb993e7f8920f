"""A sweep as a Slurm array: its scripts, and what a real Slurm makes of them."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import preference_rows, write_jsonl
from processes import until
from safetensors.torch import load_file
from slurm_cluster import Cluster, fake_command, running_cluster

from dpo_opt.optimize.config import TrainConfig
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.run import precompute
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.scorers import make_scorer
from dpo_opt.sweep.grid import named_runs, recorded_runs
from dpo_opt.sweep.outcomes import outcomes
from dpo_opt.sweep.run_sweep import launch_sweep, run_sweep, write_outcomes
from dpo_opt.sweep.slurm_array import Array, launch_array, require_no_array_at_work

ODD = "a b%A 'c' \"d\" #e $HOME;"
"""A folder name with everything that a shell or sbatch could take for something else."""


def configs(sweep: Path, **settings: Any) -> list[TrainConfig]:
    common = {"shards": "shards", "model": "model", "output_dir": sweep} | settings
    return [TrainConfig.model_validate(common | {"beta": beta}) for beta in (0.1, 0.3, 0.5)]


def script_of(sweep: Path, array: Array) -> Path:
    launched = launch_array(sweep, named_runs(sweep, configs(sweep)), array)
    assert not launched["submitted"]
    assert len(launched["commands"]) == 2
    return sweep / "slurm" / "train.sbatch"


def directives(script: Path) -> set[str]:
    head = script.read_text().split("\n\n")[0].splitlines()
    return {line.removeprefix("#SBATCH --") for line in head[1:]}


def test_the_array_has_a_task_for_each_run(tmp_path: Path) -> None:
    script = script_of(
        tmp_path, Array(gpus_per_run=4, parallel=2, time_limit="1:00:00", job_option=["account=x"])
    )
    expected = {
        "array=0-2%2",
        "gres=gpu:4",
        "ntasks=4",
        "time=1:00:00",
        "account=x",
        "requeue",
        "open-mode=append",
    }
    assert expected <= directives(script)
    table = directives(tmp_path / "slurm" / "table.sbatch")
    assert {"account=x", "ntasks=1"} <= table
    assert not any(line.startswith(("gres", "array")) for line in table)
    assert "array=0-2" in directives(script_of(tmp_path, Array()))
    with pytest.raises(ConfigError, match="sets array itself") as refused:
        script_of(tmp_path, Array(job_option=["array=1"]))
    assert "--parallel" in str(refused.value.fix)


STOPPED = 'trap "exit 75" TERM USR1; '
WAITING = 'touch "$READY"; while :; do sleep 0.05; done'
# GPUs of a run, what its program does, the signal that the script gets; exit code, and whether it goes on.
TASKS = {
    "finished": (1, "exit 0", None, 0, False),
    "refused": (1, "exit 2", None, 2, False),
    "preempted": (1, STOPPED + WAITING, "TERM", 75, True),
    # srun kills its tasks at SIGTERM, and passes SIGUSR1 on.
    "preempted, of several processes": (
        2,
        'trap "exit 9" TERM; trap "exit 75" USR1; ' + WAITING,
        "TERM",
        75,
        True,
    ),
    "out of time with a checkpoint": (1, f'{STOPPED} mkdir -p "$SAVED/step-1"; {WAITING}', "USR1", 75, True),
    "out of time without": (1, STOPPED + WAITING, "USR1", 75, False),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_task_trains_its_run_where_the_sweep_was_launched(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus, does, sent, code, goes_on = TASKS[task]
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    fake_command(tmp_path / "bin", "squeue", "echo RUNNING")
    asked = fake_command(tmp_path / "bin", "scontrol", "")
    called = fake_command(
        tmp_path / "bin", "srun" if gpus > 1 else "python-of-this-test", f'pwd > "$PLACE"; {does}'
    )
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python-of-this-test"))
    folder = tmp_path / ODD
    folder.mkdir()
    monkeypatch.chdir(folder)
    array = Array(gpus_per_run=gpus, time_limit="1" if task.startswith("out of time") else "04:00:00")
    script = script_of(Path("sweep"), array).absolute()
    monkeypatch.chdir("/")
    environment = {
        "SLURM_ARRAY_JOB_ID": "17",
        "SLURM_ARRAY_TASK_ID": "1",
        "READY": str(tmp_path / "ready"),
        "PLACE": str(tmp_path / "place"),
        "SAVED": str(folder / "sweep" / "runs" / "beta=0.3" / "checkpoints"),
    }
    with subprocess.Popen(
        ["bash", script], env=os.environ | environment, stdout=subprocess.DEVNULL
    ) as process:
        if sent:
            until((tmp_path / "ready").exists, seconds=20)
            process.send_signal(signal.Signals[f"SIG{sent}"])
        process.communicate(timeout=20)
    assert process.returncode == code
    assert asked.read_text() == ("requeue 17_1\n" if goes_on else "")
    assert called.read_text().endswith(f"train --config {folder / 'sweep' / 'configs' / 'beta=0.3.yaml'}\n")
    assert (tmp_path / "place").read_text() == f"{folder}\n"


def test_the_job_behind_the_array_writes_the_table(tmp_path: Path) -> None:
    script = script_of(tmp_path, Array())
    command = (script.parent / "table.sbatch").read_text().splitlines()[-1]
    assert command.endswith(f"-P -m dpo_opt sweep --output-dir {tmp_path}")


def test_one_sweep_has_one_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    fake_command(tmp_path / "bin", "sbatch", "echo 17")
    require_no_array_at_work(tmp_path)
    launched = launch_array(tmp_path, named_runs(tmp_path, configs(tmp_path)), Array(submit=True))
    assert (launched["array_job"], launched["table_job"]) == ("17", "17")
    fake_command(tmp_path / "bin", "squeue", "echo RUNNING")
    with pytest.raises(ConfigError, match="job 17 of this folder is there already"):
        require_no_array_at_work(tmp_path)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with running_cluster(tmp_path / "slurm") as made:
        yield made


# Imported by every Python of a job before anything else: a run takes long enough to be stopped in it.
SLOWLY = """\
import time
from dpo_opt.optimize import loop

step = loop.train_step

def slowly(run, state, *others):
    print("began step", state.at.step, flush=True)
    time.sleep(2)
    step(run, state, *others)

loop.train_step = slowly
"""


@pytest.mark.slow
def test_a_sweep_on_slurm_ends_as_one_that_ran_here(
    cluster: Cluster, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = write_jsonl(tmp_path / "data.jsonl", preference_rows(24))
    scored = PrecomputeConfig.model_validate(
        {"model": str(tiny_model), "data": data, "shards": tmp_path / "shards", "backend": "hf"}
    )
    precompute(scored, scorer=make_scorer(scored))
    settings = {"shards": tmp_path / "shards", "model": str(tiny_model), "learning_rate": 1e-3}
    settings |= {"batch_size": 4, "max_steps": 5, "eval_split": 0.25}
    here, there = tmp_path / "here", tmp_path / ODD
    run_sweep(here, configs(here, **settings))

    (tmp_path / "slowly").mkdir()
    (tmp_path / "slowly" / "sitecustomize.py").write_text(SLOWLY)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'slowly'}:{os.environ.get('PYTHONPATH', '')}")
    rows, launched = launch_sweep(there, configs(there, **settings), Array(gpus_per_run=0, submit=True))
    assert [row["state"] for row in rows] == ["not begun"] * 3
    array, last = launched["array_job"], launched["table_job"]
    disturb = {0: ("scancel", "--batch", "--signal=TERM"), 1: ("scontrol", "requeue")}

    def disturb_whoever_has_begun() -> bool:
        for task in list(disturb):
            log = there / "slurm" / "logs" / f"train-{array}_{task}.log"
            if log.is_file() and "began step 2" in log.read_text():
                cluster.say(*disturb.pop(task), f"{array}_{task}")
        assert cluster.say("squeue", "-h"), "the array ended before it was disturbed"
        return not disturb

    until(disturb_whoever_has_begun, seconds=600)
    until(lambda: not cluster.say("squeue", "-h"), seconds=900)
    tasks = [cluster.job(f"{array}_{i}") for i in range(3)]
    assert [(t["JobState"], t["Restarts"]) for t in tasks] == [
        ("COMPLETED", "1"),
        ("COMPLETED", "1"),
        ("COMPLETED", "0"),
    ]
    assert (cluster.job(last)["JobState"], cluster.job(last)["ExitCode"]) == ("COMPLETED", "0:0")
    assert outcomes(recorded_runs(there)) == outcomes(recorded_runs(here))
    assert (there / "sweep.parquet").read_bytes() == (here / "sweep.parquet").read_bytes()
    for run in recorded_runs(there):
        weights = [load_file(f / "runs" / run.name / "final" / "model.safetensors") for f in (here, there)]
        assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    again, launched = launch_sweep(there, configs(there, **settings), Array(gpus_per_run=0, submit=True))
    assert launched == {}
    assert again == write_outcomes(there)
