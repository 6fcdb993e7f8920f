"""A sweep: which runs a grid asks for, their names, and that each is the run that it would be alone."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from command_line import invoke
from fakes import preference_rows, write_jsonl
from processes import wait_for
from safetensors.torch import load_file

from dpo_opt.optimize import prepare
from dpo_opt.optimize.config import TrainConfig
from dpo_opt.precompute.workers import worker_process
from dpo_opt.schemas.errors import ConfigError, DataError
from dpo_opt.sweep.grid import SweepRun, named_runs, read_grid, record_runs, recorded_runs, run_folders
from dpo_opt.sweep.outcomes import TABLE, best_first, outcomes, write_table
from dpo_opt.sweep.processes import last_error, only_sweep, process_environments, run_processes

Program = Callable[..., subprocess.Popen[str]]
GIVEN = {"shards": "shards", "model": "model"}


def grid_file(folder: Path, **settings: object) -> Path:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def configs(folder: Path, **settings: object) -> list[TrainConfig]:
    return read_grid(grid_file(folder, **settings), GIVEN, sweep=folder / "sweep")


def sweep_of(folder: Path, **settings: object) -> list[SweepRun]:
    runs = named_runs(folder / "sweep", configs(folder, **settings))
    record_runs(folder / "sweep", runs)
    return runs


# Which runs ---------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_in_its_order(tmp_path: Path) -> None:
    runs = sweep_of(tmp_path, learning_rate=1e-5, grid={"beta": [0.1, 0.5], "seed": [1, 2]})
    assert [(run.config.beta, run.config.seed) for run in runs] == [(0.1, 1), (0.1, 2), (0.5, 1), (0.5, 2)]
    assert {run.config.learning_rate for run in runs} == {1e-5}
    assert [run.name for run in runs][:2] == ["beta=0.1_seed=1", "beta=0.1_seed=2"]
    assert {run.config.output_dir for run in runs} == {tmp_path / "sweep" / "runs" / run.name for run in runs}


def test_losses_vary_one_by_one_or_several_at_once(tmp_path: Path) -> None:
    runs = sweep_of(tmp_path, grid={"loss_type": ["sigmoid", ["ipo", "sft"]]})
    assert [run.config.loss_type for run in runs] == [["sigmoid"], ["ipo", "sft"]]
    assert [run.name for run in runs] == ["loss_type=sigmoid", "loss_type=ipo+sft"]


def test_a_list_gives_each_run_its_own_settings(tmp_path: Path) -> None:
    found = configs(tmp_path, beta=0.3, runs=[{"seed": 1}, {"beta": 0.5, "seed": 1}])
    assert [config.beta for config in found] == [0.3, 0.5]


def test_a_grid_that_grows_finds_the_runs_that_are_there(tmp_path: Path) -> None:
    first = sweep_of(tmp_path, grid={"beta": [0.1, 0.5]})
    grown = sweep_of(tmp_path, grid={"beta": [0.5, 0.9], "seed": [42, 43]})
    assert grown[0] == first[1]  # 42 is the default
    assert recorded_runs(tmp_path / "sweep") == [*first, *grown[1:]]


@pytest.mark.parametrize("value", ["../../../etc", "/abs", "a b\n[red]", "..", "x" * 500])
def test_no_value_is_a_path(value: str, tmp_path: Path) -> None:
    for run in sweep_of(tmp_path, grid={"metric_for_best_model": [value, "y"]}):
        folder = run.config.output_dir
        assert folder.resolve().parent == (tmp_path / "sweep" / "runs").resolve()
        assert folder.name == run.name
        assert len(run.name) < 200
        assert run.name.isprintable()
        assert not run.name.startswith(".")


def test_values_whose_names_are_alike_have_two_folders(tmp_path: Path) -> None:
    runs = sweep_of(tmp_path, grid={"metric_for_best_model": ["a/b", "a b"]})
    assert len({run.name for run in runs}) == 2


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "neither": ({"beta": 0.1}, "neither 'grid' nor 'runs'"),
    "both": ({"grid": {"beta": [1]}, "runs": [{}]}, "both 'grid' and 'runs'"),
    "no list": ({"grid": {"beta": 0.1}}, "mapping of settings to lists"),
    "empty": ({"grid": {"beta": []}}, "mapping of settings to lists"),
    "no mapping": ({"runs": [0.1]}, "not a list of mappings"),
    "misspelt": ({"grid": {"betta": [0.1]}}, "did you mean 'beta'"),
    "misspelt for all": ({"betta": 1, "grid": {"beta": [0.1]}}, "did you mean 'beta'"),
    "its own": ({"grid": {"output_dir": ["a", "b"]}}, "unknown setting 'output_dir'"),
    "value": ({"grid": {"beta": [0.1, -1]}}, "--beta -1: Input should be greater than 0"),
    "twice": ({"grid": {"seed": [1, 1]}}, "two runs have the same settings"),
    "given": ({"grid": {"model": ["a", "b"]}}, "--model is given, and the grid varies model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_grid_is_refused_by_name(name: str, tmp_path: Path) -> None:
    settings, message = REFUSED[name]
    with pytest.raises(ConfigError) as refusal:
        configs(tmp_path, **settings)
    assert message in str(refusal.value)
    assert str(tmp_path / "grid.yaml") in str(refusal.value)


BROKEN = [
    *("", "[1]", "7", "a: [1]", "a:", "a: {output_dir: x}", "../up: {}", "a: {beta: -1}", "a: {beta: .inf}"),
    *("\t", "a: [", "1: {}", "null: {}", "!!python/object/apply:os.getcwd []", "a: {more: 1}", "\xff"),
    "a: " + "[" * 5000,
]


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_a_damaged_record_is_named_with_what_is_wrong_and_what_mends_it(text: str, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError) as caught:
        recorded_runs(tmp_path)
    assert caught.value.where == str(file)
    assert not caught.value.what.endswith("for TrainConfig)")
    command = str(caught.value.fix).partition(", then dpo-opt sweep --config GRID.yaml --output-dir ")[0]
    subprocess.run(["bash", "-ec", command], check=True)
    assert recorded_runs(tmp_path) == []


def test_a_sweeps_table_takes_values_of_any_kind_and_length(tmp_path: Path) -> None:
    values = [1, 2.5, "auto", 10**400, [1, "a"], True, None]
    for name, some in {
        "numbers": [1, 2.5, None],
        "words": ["a", "b", None],
        "lists": [[1], ["a"], None],
        "huge": [1, 10**400, None],
        "mixed": ["auto", 3, None],
        "kinds": [True, 3, None],
    }.items():
        write_table(tmp_path, [{"run": str(i), name: value} for i, value in enumerate(some)])
        found = pq.read_table(tmp_path / TABLE)[name].to_pylist()
        plain = name in ("numbers", "words")
        assert found == (some if plain else [v if v is None or v == "auto" else json.dumps(v) for v in some])
    write_table(tmp_path, [{"run": str(i), "all": value} for i, value in enumerate(values)])
    assert len(pq.read_table(tmp_path / TABLE)) == len(values)


# Where they run -----------------------------------------------------------------------------------------


def test_each_run_has_its_gpus_or_its_share_of_the_cores() -> None:
    four = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}

    def gpus(*places: str) -> list[dict[str, str]]:
        return [{"CUDA_VISIBLE_DEVICES": place} for place in places]

    assert process_environments(None, None, four, cores=8) == gpus("4", "5", "6", "7")
    assert process_environments(1, None, four, cores=8) == gpus("4")
    assert process_environments(None, 2, four, cores=8) == gpus("4,5", "6,7")
    assert process_environments(None, 3, four, cores=8) == gpus("4,5,6")
    assert (
        process_environments(2, 0, four, cores=8)
        == [{"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "4"}] * 2
    )
    none = {"CUDA_VISIBLE_DEVICES": ""}
    # Alone, a run has the threads that it would have without a sweep: its sums are the same.
    assert process_environments(None, None, none, cores=8) == [{}]
    assert process_environments(4, None, none, cores=8) == [{"OMP_NUM_THREADS": "2"}] * 4


@pytest.mark.parametrize(
    ("parallel", "each", "visible", "what", "fix"),
    [
        (3, None, "4,5", "--parallel 3: this machine has 2 GPUs", "--parallel 2"),
        (2, 2, "4,5", "--parallel 2 --gpus-per-run 2: this machine has 2 GPUs", "--parallel 1"),
        (None, 4, "4,5", "--gpus-per-run 4: this machine has 2 GPUs", "--gpus-per-run 2"),
        (None, 2, "", "--gpus-per-run 2: this machine has 0 GPUs", "leave out --gpus-per-run"),
    ],
)
def test_more_gpus_than_there_are_are_refused(
    parallel: int | None, each: int | None, visible: str, what: str, fix: str
) -> None:
    with pytest.raises(ConfigError, match=what) as refused:
        process_environments(parallel, each, {"CUDA_VISIBLE_DEVICES": visible}, cores=8)
    assert fix in str(refused.value.fix)


def test_a_second_sweep_in_the_folder_is_refused(tmp_path: Path) -> None:
    with (
        only_sweep(tmp_path),
        pytest.raises(ConfigError, match="another dpo-opt sweep is at work"),
        only_sweep(tmp_path),
    ):
        pass
    with only_sweep(tmp_path):
        pass


def test_a_sweep_waits_for_runs_of_one_that_was_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with only_sweep(tmp_path) as held:
        run = subprocess.Popen(["sh", "-c", 'sleep 0.5; touch "$0"', tmp_path / "saved"], pass_fds=[held])
    with only_sweep(tmp_path):
        assert (tmp_path / "saved").exists()
    run.wait()
    assert "waiting for runs of a sweep that was killed" in capsys.readouterr().err


def test_a_run_of_several_processes_ends_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    does = 'echo "error: process $RANK of $WORLD_SIZE"; [ "$RANK" != 1 ] || exit 3; exec sleep 100'
    waits = f'[ "$RANK" = 1 ] || sleep 0.3; : "$LOCAL_RANK $MASTER_ADDR $MASTER_PORT"; {does}'
    monkeypatch.setattr(worker_process, "command", lambda *_: ["bash", "-uc", waits])
    runs = sweep_of(tmp_path, grid={"beta": [0.1, 0.2]})
    sweep = tmp_path / "sweep"
    for run in runs:
        log = sweep / "logs" / f"{run.name}.log"
        log.parent.mkdir(exist_ok=True)
        log.write_text("error: of an earlier attempt\n")
    with only_sweep(sweep) as held:
        found = list(run_processes(sweep, runs, [{}], processes=2, held=held, looked=lambda _: None))
    assert [(ended.run, ended.code, last_error(ended).splitlines()[0]) for ended in found] == [
        (run, 3, "process 1 of 2") for run in runs
    ]


# What came out ------------------------------------------------------------------------------------------


def finish(run: SweepRun, *, accuracy: float) -> None:
    (run.config.output_dir / "final").mkdir(parents=True)
    history = [
        {"step": 1, "loss": 0.7, "pairs_per_second": 1.0},
        {"step": 2, "loss": 0.6, "pairs_per_second": 2.0},
        {"step": 2, "eval_loss": 0.5, "eval_rewards/accuracies": accuracy},
    ]
    state = {"global_step": 2, "log_history": history}
    (run.config.output_dir / "trainer_state.json").write_text(json.dumps(state))


def test_the_table_has_what_differs_and_what_came_out(tmp_path: Path) -> None:
    runs = sweep_of(
        tmp_path, runs=[{"beta": 0.1}, {"beta": 0.2}, {"beta": 0.3, "lora_target_modules": ["a"]}]
    )
    finish(runs[0], accuracy=0.25)
    finish(runs[1], accuracy=0.75)
    rows = outcomes(runs)
    assert [row["run"] for row in best_first(rows)] == [runs[1].name, runs[0].name, runs[2].name]
    write_table(tmp_path, rows)
    read = pq.read_table(tmp_path / "sweep.parquet").to_pylist()
    assert read[0] == {
        "run": runs[0].name,
        "state": "finished",
        "beta": 0.1,
        "lora_target_modules": "[]",
        "steps": 2,
        "eval_loss": 0.5,
        "eval_rewards/accuracies": 0.25,
        "loss": 0.6,
    }
    assert read[2]["state"] == "not begun"
    assert read[2]["loss"] is None


def test_a_sweep_stands_for_its_runs_in_a_report(tmp_path: Path) -> None:
    runs = sweep_of(tmp_path, grid={"beta": [0.1, 0.2]})
    finish(runs[1], accuracy=1.0)
    assert run_folders(tmp_path / "sweep") == [runs[1].config.output_dir]
    assert run_folders(tmp_path) == [tmp_path]


def test_the_table_is_written_from_the_folders_alone(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    refused = invoke("sweep", "--output-dir", sweep)
    assert (refused.exit_code, sweep.exists()) == (2, False)
    assert "there is no sweep here" in refused.stderr
    runs = sweep_of(tmp_path, grid={"beta": [0.1, 0.2]})
    finish(runs[1], accuracy=1.0)
    assert invoke("sweep", "--output-dir", sweep, "--dry-run").exit_code == 0
    assert not (sweep / "sweep.parquet").exists()
    result = invoke("sweep", "--output-dir", sweep)
    assert [line.split()[:2] for line in result.stdout.splitlines()[1:3]] == [
        ["beta=0.2", "finished"],
        ["beta=0.1", "not"],
    ]
    states = pq.read_table(sweep / "sweep.parquet")["state"].to_pylist()
    assert states == ["not begun", "finished"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--shards", "shards"], "--shards is given, and --config is not"),
        (["--scheduler", "slurm"], "--scheduler is given, and --config is not"),
        (["--submit"], "--submit is an option of --scheduler slurm"),
        (["--job-option", "a=b"], "--job-option is an option of --scheduler slurm"),
        (["--time-limit", "1"], "--time-limit is an option of --scheduler slurm"),
    ],
)
def test_an_option_that_would_have_no_effect_is_refused(
    given: list[str], message: str, tmp_path: Path
) -> None:
    result = invoke("sweep", "--output-dir", tmp_path, *given)
    assert result.exit_code == 2
    assert message in result.stderr


# Real runs ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("sweep")
    data = write_jsonl(base / "data.jsonl", preference_rows(24))
    arguments = ["precompute", "--model", tiny_model, "--data", data, "--shards", base / "shards"]
    result = invoke(*arguments, "--backend", "hf")
    assert result.exit_code == 0, result.output
    return base / "shards"


@pytest.fixture
def program() -> Iterator[Program]:
    """Starts the command line as a process of its own; a test that fails leaves none behind."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "dpo_opt", *map(str, arguments)]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, text=True, stdout=pipe, stderr=pipe))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


SETTINGS: dict[str, Any] = {"learning_rate": 1e-3, "batch_size": 4, "eval_split": 0.25, "logging_steps": 1}


def test_a_killed_sweep_goes_on_and_each_run_is_the_run_alone(
    program: Program, shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    grid = grid_file(tmp_path, **SETTINGS, max_steps=3, grid={"beta": [0.1, 0.5]})
    # The folder that was scored is not needed, nor any other copy of the reference.
    policy = shutil.copytree(tiny_model, tmp_path / "policy")
    sweep = tmp_path / "sweep"
    command = ["sweep", "--shards", shards, "--model", policy, "--config", grid, "--output-dir", sweep]
    process = program(*command)
    first, second = (sweep / "runs" / name for name in ("beta=0.1", "beta=0.5"))
    wait_for(second.is_dir, process)
    process.kill()
    process.communicate()
    before = (first / "metrics.jsonl").stat().st_mtime_ns
    # Its run ends with it, however it was killed: two runs never write one folder.
    process = program(*command)
    out, said = process.communicate()
    assert process.returncode == 0, said
    assert "beta=0.1: begins" not in said
    assert (first / "metrics.jsonl").stat().st_mtime_ns == before, "a finished run was repeated"
    assert out.splitlines()[0].split()[:2] == ["run", "state"]
    table = pq.read_table(sweep / "sweep.parquet").to_pylist()
    assert [(row["run"], row["state"], row["steps"]) for row in table] == [
        ("beta=0.1", "finished", 3),
        ("beta=0.5", "finished", 3),
    ]

    alone = tmp_path / "alone"
    given = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    arguments = [
        "--shards",
        shards,
        "--model",
        policy,
        "--output-dir",
        alone,
        "--max-steps",
        3,
        "--beta",
        0.5,
    ]
    process = program("train", *arguments, *given)
    assert process.wait() == 0, process.communicate()
    weights = [load_file(run / "final" / "model.safetensors") for run in (alone, second)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    assert not all(
        load_file(first / "final" / "model.safetensors")[name].equal(weights[0][name]) for name in weights[0]
    )


def test_one_run_that_fails_is_said_and_the_others_are_trained(
    program: Program, shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    grid = grid_file(
        tmp_path,
        **SETTINGS,
        max_steps=2,
        runs=[{"beta": 0.1}, {"beta": 0.2, "learning_rate": 1e30}],
    )
    command = ["sweep", "--shards", shards, "--model", tiny_model, "--config", grid]
    process = program(*command, "--output-dir", tmp_path / "sweep", "--parallel", 2)
    _, said = process.communicate()
    assert process.returncode == 1, said
    assert "1 of 2 runs failed" in said
    assert "the first is beta=0.2_learning_rate=1e+30" in said
    assert "is not finite" in said
    assert "Traceback" not in said
    table = pq.read_table(tmp_path / "sweep" / "sweep.parquet").to_pylist()
    assert [row["state"] for row in table] == ["finished", "unfinished"]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an option of another loss": ({"simpo_gamma": 1.0}, "--simpo-gamma belongs to simpo"),
    "a loss without its option": ({"loss_type": "rdpo"}, "--loss-type rdpo needs --rdpo-alpha"),
    "weights of other losses": ({"loss_weights": [1, 2]}, "--loss-weights has 2 and --loss-type 1"),
    "a column that the data lacks": ({"loss_type": "odpo"}, "margin"),
    "a metric of no evaluation": ({"metric_for_best_model": "eval_x"}, "'eval_x' is not a metric"),
    "an evaluation that needs pairs": ({"eval_split": 0.0, "eval_steps": 1}, "nothing to evaluate on"),
    "another model": ({"model": "nowhere"}, "nowhere"),
    "an unknown loss": ({"loss_type": "sigmoyd"}, "--loss-type"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_one_run_cannot_do_is_said_before_any_begins(
    wrong: str, shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    settings, message = WRONG[wrong]
    right: list[dict[str, Any]] = [{"model": str(tiny_model), "seed": seed} for seed in range(3)]
    runs = [*right[:2], right[2] | settings]
    grid = grid_file(tmp_path, **SETTINGS, shards=str(shards), runs=runs)
    for extra in ([], ["--dry-run"]):
        result = invoke("sweep", "--config", grid, "--output-dir", tmp_path / "sweep", *extra)
        assert result.exit_code == 2, result.output
        assert message in result.stderr
        assert "seed=2" in result.stderr.splitlines()[0]
        assert not (tmp_path / "sweep").exists()


def test_one_model_is_compared_with_the_shards_once(
    shards: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[object] = []
    monkeypatch.setattr(prepare, "require_same_model", lambda *_, **given: compared.append(given["fields"]))
    runs = [{"seed": 1}, {"seed": 2}, {"seed": 3, "reference_differs": True}, {"seed": 4}]
    grid = grid_file(tmp_path, **SETTINGS, shards=str(shards), model=str(tiny_model), runs=runs)
    result = invoke("sweep", "--config", grid, "--output-dir", tmp_path / "sweep", "--dry-run")
    assert result.exit_code == 0, result.output
    assert len(compared) == 2


def test_a_file_in_place_of_a_runs_folder_is_named(shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    grid = grid_file(
        tmp_path, **SETTINGS, shards=str(shards), model=str(tiny_model), grid={"beta": [0.1, 0.2]}
    )
    (tmp_path / "sweep" / "runs").mkdir(parents=True)
    (tmp_path / "sweep" / "runs" / "beta=0.2").touch()
    result = invoke("sweep", "--config", grid, "--output-dir", tmp_path / "sweep")
    assert result.exit_code == 2, result.output
    assert "run beta=0.2: its folder is a file" in result.stderr


def test_what_no_run_can_do_is_said_before_any_begins(tiny_model: Path, tmp_path: Path) -> None:
    grid = grid_file(tmp_path, grid={"beta": [0.1, 0.5]})
    sweep = tmp_path / "sweep"
    command = ["sweep", "--shards", tmp_path / "nowhere", "--model", tiny_model, "--config", grid]
    for extra in ([], ["--dry-run"]):
        result = invoke(*command, "--output-dir", sweep, *extra)
        assert result.exit_code == 2 or result.exit_code == 3, result.output
        assert "nowhere" in result.stderr
        assert not sweep.exists()


def test_a_sweep_that_is_told_to_stop_leaves_no_process(
    program: Program, shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    grid = grid_file(tmp_path, **SETTINGS, max_steps=500, grid={"beta": [0.1, 0.5]})
    sweep = tmp_path / "sweep"
    process = program(
        "sweep", "--shards", shards, "--model", tiny_model, "--config", grid, "--output-dir", sweep
    )
    run = sweep / "runs" / "beta=0.1"
    wait_for((run / "metrics.jsonl").is_file, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 75, said
    assert "dpo-opt sweep" in said
    assert (run / "preempted.json").is_file()
    assert list((run / "checkpoints").iterdir())
    left = subprocess.run(["pgrep", "-f", str(sweep)], capture_output=True, text=True, check=False)
    assert left.stdout == ""
