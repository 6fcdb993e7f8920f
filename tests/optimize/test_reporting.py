"""What a run reports to trackers, read back from the trackers' own files, and trackers that fail."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from processes import torchrun
from training_runs import Interrupter, contents

from dpo_opt.cli import main
from dpo_opt.optimize import TrainConfig, train
from dpo_opt.optimize.reporting import reports as reports_module
from dpo_opt.optimize.reporting import trackers
from dpo_opt.optimize.reporting.reports import Reports, as_reported, run_id
from dpo_opt.schemas.errors import ConfigError, FingerprintError, Preempted

Line = dict[str, float]
KEY = "0123456789abcdef" * 2 + "89abcdef"


def logged(run: Path) -> dict[int, Line]:
    """By step, what metrics.jsonl says under the names of dashboards."""
    found: dict[int, Line] = {}
    for text in (run / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        found.setdefault(line["step"], {}).update(as_reported(line))
    return found


class FakeTracker:
    """Keeps what it gets, in the order in which it comes."""

    def __init__(self, about: trackers.About) -> None:
        self.about = about
        self.lines: list[tuple[int, Mapping[str, float]]] = []
        self.closed: bool | None = None
        OPENED.append(self)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.lines.append((step, metrics))

    def close(self, *, finished: bool) -> None:
        self.closed = finished


OPENED: list[FakeTracker] = []


class FailsToOpen(FakeTracker):
    def __init__(self, about: trackers.About) -> None:
        raise PermissionError("no account at https://ann:hunter2@tracker.example/api")


class FailsInTheMiddle(FakeTracker):
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        super().log(metrics, step)
        if len(self.lines) == 2:
            raise ConnectionError("the server is gone")


class FailsToClose(FakeTracker):
    def close(self, *, finished: bool) -> None:
        raise RuntimeError("the disk is full")


class Hangs(FakeTracker):
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        threading.Event().wait()


class Lines:
    """A progress that keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def start(self, what: str, *, total: int | None, unit: str, done: int = 0) -> None: ...
    def advance(self, count: int, note: str = "") -> None: ...
    def finish(self) -> None: ...
    def say(self, line: str) -> None:
        self.said.append(line)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[type[FakeTracker]], None]]:
    """Puts a tracker in the place of TensorBoard."""
    OPENED.clear()

    def put(kind: type[FakeTracker]) -> None:
        monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr(reports_module, "TRACKERS", {"tensorboard": kind})

    yield put
    OPENED.clear()


@pytest.fixture(scope="session")
def reported(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "report_to": ["tensorboard"], "logging_steps": 1}


@pytest.fixture(scope="session")
def unreported(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run says when nothing is reported."""
    run = tmp_path_factory.mktemp("unreported") / "run"
    train(TrainConfig(**{**settings, "logging_steps": 1}, output_dir=run))
    return contents(run)


def test_every_line_is_reported_under_the_names_of_trls_runs(
    reported: dict[str, Any], tmp_path: Path, fake: Callable[[type[FakeTracker]], None]
) -> None:
    fake(FakeTracker)
    run = tmp_path / "run"
    train(TrainConfig(**reported, output_dir=run))
    (tracker,) = OPENED
    found: dict[int, dict[str, float]] = {}
    for step, metrics in tracker.lines:
        found.setdefault(step, {}).update(metrics)
    assert found == logged(run)
    trls = ["loss", *(f"rewards/{n}" for n in ("chosen", "rejected", "accuracies", "margins"))]
    trls += ["logps/chosen", "logps/rejected"]
    names = {name for line in found.values() for name in line}
    assert {f"{group}/{name}" for group in ("train", "eval") for name in trls} <= names
    assert {"train/learning_rate", "train/grad_norm", "train/epoch", "train/num_tokens"} <= names
    assert tracker.closed is True
    assert tracker.about.settings["learning_rate"] == reported["learning_rate"]
    assert tracker.about.name == f"run-{run_id(run)}"


@pytest.mark.parametrize(
    ("kind", "warning"),
    [
        (FailsToOpen, "PermissionError: no account at https://tracker.example/api"),
        (FailsInTheMiddle, "ConnectionError: the server is gone"),
        (FailsToClose, "RuntimeError: the disk is full"),
        (Hangs, "did not answer for 0 s"),
    ],
)
def test_a_tracker_that_fails_changes_nothing_and_is_named_once(
    kind: type[FakeTracker],
    warning: str,
    reported: dict[str, Any],
    unreported: dict[str, Any],
    tmp_path: Path,
    fake: Callable[[type[FakeTracker]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake(kind)
    if kind is Hangs:
        monkeypatch.setattr(reports_module, "_LAST_SECONDS", 0.2)
    progress = Lines()
    train(TrainConfig(**reported, output_dir=tmp_path / "run"), progress=progress)
    assert contents(tmp_path / "run") == unreported
    said = [line for line in progress.said if "metrics.jsonl has every line" in line]
    assert len(said) == 1
    assert warning in said[0]
    assert "hunter2" not in said[0]
    if kind is FailsInTheMiddle:
        assert len(OPENED[0].lines) == 2
        assert OPENED[0].closed is None


def test_one_that_fails_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: Callable[[type[FakeTracker]], None]
) -> None:
    fake(FakeTracker)
    monkeypatch.setattr(reports_module, "TRACKERS", {"wandb": FailsToOpen, "trackio": FakeTracker})
    said: list[str] = []
    with Reports(["wandb", "trackio"], run=tmp_path, settings={}, say=said.append) as reports:
        for step in (1, 2, 3):
            reports.log({"step": step, "loss": 1 / step})
    (tracker,) = OPENED
    assert tracker.lines == [(step, {"train/loss": 1 / step}) for step in (1, 2, 3)]
    assert len(said) == 1


def test_a_run_that_goes_on_has_the_same_name_and_says_from_which_step(
    reported: dict[str, Any],
    tmp_path: Path,
    fake: Callable[[type[FakeTracker]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake(FakeTracker)
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        Interrupter(patched, at=9)
        with pytest.raises(Preempted):
            train(TrainConfig(**reported, output_dir=run))
    train(TrainConfig(**reported, output_dir=run, resume=True))
    first, second = OPENED
    assert (first.closed, second.closed) == (False, True)
    assert first.about.name == second.about.name
    assert second.about.first_step == second.lines[0][0]
    whole = [line for line in first.lines if line[0] < second.about.first_step] + second.lines
    assert {step for step, _ in whole} == set(logged(run))


@pytest.mark.parametrize("found", ['{"id": "../../etc"}', '{"id": 7}', '{"id":', "[]", ""])
def test_an_id_that_is_none_is_made_again(found: str, tmp_path: Path) -> None:
    (tmp_path / "reports.json").write_text(found)
    made = run_id(tmp_path)
    assert len(made) == 8
    assert int(made, 16) >= 0
    assert run_id(tmp_path) == made


def test_a_missing_package_is_refused_before_anything_begins(
    shards: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    arguments = ["train", "--shards", shards, "--model", tiny_model, "--output-dir", tmp_path / "run"]
    result = CliRunner().invoke(main, [*map(str, arguments), "--report-to", "wandb", "--report-to", "mlflow"])
    assert result.exit_code == 2
    assert "pip install wandb mlflow" in result.output
    assert not (tmp_path / "run").exists()


def test_a_refused_run_is_reported_nowhere(
    reported: dict[str, Any],
    other_model: Path,
    tmp_path: Path,
    fake: Callable[[type[FakeTracker]], None],
) -> None:
    fake(FakeTracker)
    with pytest.raises(FingerprintError):
        train(TrainConfig(**{**reported, "model": str(other_model)}, output_dir=tmp_path / "run"))
    assert OPENED == []
    assert not (tmp_path / "run").exists()


def events(run: Path) -> dict[int, Line]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run / "tensorboard"))
    reader.Reload()
    found: dict[int, Line] = {}
    for name in reader.Tags()["scalars"]:
        for event in reader.Scalars(name):
            line = found.setdefault(event.step, {})
            assert name not in line, "a step is there twice"
            line[name] = event.value
    return found


def in_float32(lines: dict[int, Line]) -> dict[int, Line]:
    """As TensorBoard keeps numbers."""
    return {step: {n: float(np.float32(v)) for n, v in line.items()} for step, line in lines.items()}


def test_tensorboard_has_every_number_once_also_of_a_run_that_was_killed(
    reported: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    run = tmp_path / "run"
    settings = {**reported, "save_steps": 2}

    def killed(self: object, *_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        # No checkpoint is of the last step, which is logged: it is made and logged again.
        patched.setattr("dpo_opt.optimize.throughput.Throughput.leave_out", _at_the(5, killed))
        with pytest.raises(KeyboardInterrupt):
            train(TrainConfig(**settings, output_dir=run))
    before = set(events(run))
    train(TrainConfig(**settings, output_dir=run, resume=True))
    assert max(before) > 2
    assert events(run) == in_float32(logged(run))
    assert len(list((run / "tensorboard").iterdir())) == 2


def _at_the(number: int, call: Callable[..., None]) -> Callable[..., None]:
    calls = 0

    def counted(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            call(*arguments)

    return counted


@pytest.mark.slow
def test_the_first_of_two_processes_reports(reported: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    config = TrainConfig(**reported, output_dir=tmp_path / "run").model_dump(mode="json")
    (tmp_path / "runs.json").write_text(json.dumps([[config, 0, 0]]))
    torchrun(2, str(Path(__file__).parents[1] / "torchrun_training.py"), tmp_path / "runs.json")
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    assert events(tmp_path / "run") == in_float32(logged(tmp_path / "run"))


def offline_wandb(run: Path, place: Path) -> dict[int, Line]:
    """From W&B's local files: LevelDB's log format, with a protocol buffer for each record."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[int, Line] = {}
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    assert {file.stem for file in files} == {f"run-{run_id(run)}"}
    for file in files:
        data, at, held = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
            size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            held, at = held + data[at + 7 : at + 7 + size], at + 7 + size
            if kind in (1, 4):  # a whole record, or its last part
                record = Record.FromString(held)
                held = b""
                items = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
                values = {name: json.loads(value) for name, value in items.items() if name[0] != "_"}
                if values:
                    found.setdefault(record.history.step.num, {}).update(values)
    return found


def trackio_database(run: Path, place: Path) -> dict[int, Line]:
    program = (
        "import json, sys; from trackio.sqlite_storage import SQLiteStorage\n"
        "print(json.dumps(SQLiteStorage.get_logs('dpo-opt', sys.argv[1])))"
    )
    text = subprocess.run(
        [sys.executable, "-c", program, f"run-{run_id(run)}"],
        env=os.environ | {"TRACKIO_DIR": str(place)},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found: dict[int, Line] = {}
    for line in json.loads(text.splitlines()[-1]):
        values = {name: value for name, value in line.items() if name.startswith(("train/", "eval/"))}
        found.setdefault(line["step"], {}).update(values)
    return found


def mlflow_store(run: Path, place: Path) -> dict[int, Line]:
    from mlflow import MlflowClient

    client = MlflowClient(place.as_uri())
    number = client.get_experiment_by_name("dpo-opt").experiment_id
    (only,) = client.search_runs([number])
    assert only.info.status == "FINISHED"
    found: dict[int, Line] = {}
    for name in only.data.metrics:
        for value in client.get_metric_history(only.info.run_id, name):
            found.setdefault(value.step, {})[name] = value.value
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "read"), [("wandb", offline_wandb), ("trackio", trackio_database), ("mlflow", mlflow_store)]
)
def test_a_tracker_has_every_number_also_of_a_run_that_was_stopped(
    name: str,
    read: Callable[[Path, Path], dict[int, Line]],
    reported: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip(name, reason=f"{name} is not installed")
    run, place = tmp_path / "run", tmp_path / "place"
    config = TrainConfig(**{**reported, "report_to": [name], "num_train_epochs": 20}, output_dir=run)
    variables = {
        "WANDB_MODE": "offline", "WANDB_API_KEY": KEY, "TRACKIO_DIR": str(place),
        "MLFLOW_TRACKING_URI": place.as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true",
    }  # fmt: skip
    (tmp_path / "run.json").write_text(config.model_dump_json(exclude={"output_dir"}))
    command = [sys.executable, "-m", "dpo_opt", "train", "--config", tmp_path / "run.json"]

    def start(*more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*map(str, command), "--output-dir", str(run), *more, "--json"], env=os.environ | variables,
            text=True, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    stopped = start()
    while not (run / "reports.json").is_file():
        assert stopped.poll() is None, stopped.communicate()
    stopped.send_signal(signal.SIGTERM)
    _, said = stopped.communicate(timeout=120)
    assert stopped.returncode == 75, said
    result, said = start("--resume").communicate(timeout=240)
    assert "metrics.jsonl has every line" not in said, said
    assert math.isfinite(json.loads(result)["loss"]), "something else stands where the result is"
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", variables["MLFLOW_ALLOW_FILE_STORE"])
    assert read(run, place) == logged(run)
    for file in (*run.rglob("*"), *place.rglob("*")):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file


def test_report_to_takes_known_names_only() -> None:
    with pytest.raises((ConfigError, ValueError), match="comet"):
        TrainConfig(shards="s", model="m", output_dir="o", report_to=["comet"])
