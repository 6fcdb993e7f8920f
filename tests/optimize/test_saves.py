"""Checkpoints are written while training goes on; a step is repeated whose memory ran out."""

import errno
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import killed_saves
import pytest
import torch
from processes import ONE_THREAD
from safetensors.torch import load_file, save
from training_runs import contents, without_saves

from dpo_opt.optimize import TrainConfig, train
from dpo_opt.optimize.checkpoint import checkpoints, saving, state_files
from dpo_opt.optimize.checkpoint.background import BackgroundSaves
from dpo_opt.optimize.checkpoint.saving import Snapshot
from dpo_opt.optimize.checkpoint.tensor_file import write_tensors
from dpo_opt.schemas.errors import DpoOptError
from dpo_opt.schemas.progress import Silent
from dpo_opt.schemas.storage import sha256_file


@pytest.fixture(scope="module")
def undisturbed(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run says whose saves take no time."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(TrainConfig(**settings, output_dir=run))
    return contents(run)


def saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def test_a_file_is_what_safetensors_writes_and_its_hash_is_known(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(40, 3),
        "transposed": torch.randn(4, 6).T,
        "half": torch.randn(7, 5).to(torch.bfloat16),
        "count": torch.tensor(2**40 + 1),
        "none": torch.zeros(0, 3),
        "ö": torch.arange(3, dtype=torch.uint8),
    }
    path = tmp_path / "file"
    assert write_tensors(path, tensors, {"format": "pt"}) == sha256_file(path)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert path.read_bytes() == save(whole, metadata={"format": "pt"})
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(path).items())


def test_no_weights_are_read_to_be_hashed(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def watched(path: Path) -> str:
        read.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr(checkpoints, "sha256_file", watched)
    train(TrainConfig(**without_saves(settings), max_steps=1, output_dir=tmp_path / "run"))
    assert "training_state.json" in read
    assert not [name for name in read if name.endswith(".safetensors")]
    monkeypatch.undo()
    assert checkpoints.newest_checkpoint(tmp_path / "run", pytest.fail)


class Steps(Silent):
    """Says how many steps are made, to other threads too."""

    def __init__(self) -> None:
        self.done = 0
        self.made = threading.Condition()

    def advance(self, count: int, note: str = "") -> None:
        with self.made:
            self.done += count
            self.made.notify_all()

    def wait_for(self, step: int) -> None:
        with self.made:
            assert self.made.wait_for(lambda: self.done >= step, timeout=60)


def test_training_goes_on_while_a_checkpoint_is_written(
    settings: dict[str, Any], undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, steps, write = tmp_path / "run", Steps(), saving.write_model
    written: list[int] = []

    def slow(*args: Any, **kwargs: Any) -> dict[str, str]:
        steps.wait_for(6)
        written.append(steps.done)
        return write(*args, **kwargs)

    monkeypatch.setattr(saving, "write_model", slow)
    # The checkpoint of step 4 is written when the last step is made, and the one of that step after it.
    train(TrainConfig(**{**settings, "save_steps": 4, "eval_steps": None}, output_dir=run), progress=steps)
    assert contents(run)["weights"] == undisturbed["weights"]
    assert saved(run) == ["step-00000004", "step-00000006"]
    assert written == [6, 6, 6]


def test_an_update_waits_for_the_copy_of_what_it_changes(
    settings: dict[str, Any], undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied, begin, wait = Snapshot.copied, BackgroundSaves.begin, BackgroundSaves.wait_for_copy
    updates = threading.Event()

    def begun(*args: Any) -> None:
        updates.clear()
        begin(*args)

    def waited_for(saves: BackgroundSaves) -> None:
        updates.set()
        wait(saves)

    def late(snapshot: Snapshot) -> Snapshot:
        assert updates.wait(timeout=60)
        time.sleep(0.1)  # an update would be made by now
        return copied(snapshot)

    monkeypatch.setattr(BackgroundSaves, "begin", begun)
    monkeypatch.setattr(BackgroundSaves, "wait_for_copy", waited_for)
    monkeypatch.setattr(Snapshot, "copied", late)
    run, other = tmp_path / "run", tmp_path / "other"
    train(TrainConfig(**settings, output_dir=run))
    monkeypatch.undo()
    train(TrainConfig(**settings, output_dir=other))
    for path in sorted((run / "checkpoints" / "step-00000004").rglob("*.safetensors")):
        assert sha256_file(path) == sha256_file(other / path.relative_to(run)), path
    assert contents(run) == undisturbed


@pytest.mark.parametrize("where", ["policy", "optimizer"])
def test_a_disk_that_is_full_in_the_background_ends_the_run_and_is_named(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    place, name = (saving, "write_model") if where == "policy" else (state_files, "write_tensors")
    function: Callable[..., Any] = getattr(place, name)
    calls: list[bool] = []

    def full(*args: Any, **kwargs: Any) -> Any:
        calls.append(threading.current_thread() is threading.main_thread())
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*args, **kwargs)

    monkeypatch.setattr(place, name, full)
    run = tmp_path / "run"
    with pytest.raises(DpoOptError, match="the disk is full") as caught:
        train(TrainConfig(**settings, output_dir=run))
    assert caught.value.where == str(run / "checkpoints")
    assert caught.value.why
    assert caught.value.fix
    assert calls == [False, False]
    assert saved(run) == ["step-00000002"]
    assert not [*(run / "checkpoints").glob(".*")]
    assert not (run / "final").exists()
    assert not (run / "preempted.json").exists()


def test_what_ended_a_run_comes_before_what_ended_its_save() -> None:
    failures: list[str] = []

    def fail(_: Snapshot) -> None:
        raise OSError("in the background")

    def run(error: Exception | None) -> None:
        with BackgroundSaves(lambda: failures.append("failed")) as saves:
            saves.begin(Snapshot({}, gathered=True, optimizer=[]), fail)
            if error is not None:
                raise error

    with pytest.raises(ValueError, match="the run"):
        run(ValueError("the run"))
    with pytest.raises(OSError, match="in the background"):
        run(None)
    assert failures == ["failed", "failed"]


def test_a_save_at_the_end_is_no_copy(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Snapshot, "copied", pytest.fail)
    train(TrainConfig(**without_saves(settings), max_steps=1, output_dir=tmp_path / "run"))
    assert saved(tmp_path / "run") == ["step-00000001"]


def test_a_kill_inside_a_save_loses_nothing_but_that_save(settings: dict[str, Any], tmp_path: Path) -> None:
    """Real processes and SIGKILL, at every stage of a save."""
    short = {**settings, "eval_steps": None, "save_steps": 1, "max_steps": 3}
    train(TrainConfig(**short, output_dir=tmp_path / "undisturbed"))
    plain = json.dumps({**short, "shards": str(settings["shards"])})
    program = [sys.executable, killed_saves.__file__, plain, str(tmp_path)]
    subprocess.run(program, check=True, timeout=300, env={**os.environ, **ONE_THREAD})
    for moment in killed_saves.MOMENTS:
        whole = ["step-00000001"] + (["step-00000002"] if moment == "older ones" else [])
        assert saved(tmp_path / moment) == whole, moment
        train(TrainConfig(**short, output_dir=tmp_path / moment, resume=True))
        assert not [*(tmp_path / moment / "checkpoints").glob(".*")]
        assert contents(tmp_path / moment) == contents(tmp_path / "undisturbed"), moment


class Listener(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def without_memory(monkeypatch: pytest.MonkeyPatch, *, calls: set[int], after: bool) -> None:
    """Memory runs out in these calls of a micro-batch's backward, before or after gradients were added."""
    backward, made = torch.autograd.backward, 0

    def run_out(*args: Any, **kwargs: Any) -> None:
        nonlocal made
        made += 1
        if made in calls and not after:
            raise torch.OutOfMemoryError("planted")
        backward(*args, **kwargs)
        if made in calls:
            raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(torch.autograd, "backward", run_out)


@pytest.mark.parametrize("after", [False, True])
def test_a_step_whose_memory_ran_out_is_repeated_with_the_same_update(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    short = {**settings, "max_steps": 2}
    train(TrainConfig(**{**short, "micro_batch_tokens": 60}, output_dir=tmp_path / "half"))
    listener = Listener()
    with monkeypatch.context() as patched:
        without_memory(patched, calls={2}, after=after)
        train(TrainConfig(**short, output_dir=tmp_path / "run"), progress=listener)
    assert listener.lines == [
        "memory ran out in step 1: it is repeated, and from here on micro-batches have at most 60 token "
        "rows, not 120"
    ]
    assert contents(tmp_path / "run") == contents(tmp_path / "half")
    state = json.loads(next((tmp_path / "run/checkpoints").glob("*/training_state.json")).read_text())
    assert state["micro_batch_tokens"] == 60


def test_a_run_goes_on_with_the_budget_that_memory_left(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constant = {**settings, "lr_scheduler_type": "constant"}
    half = {**constant, "micro_batch_tokens": 60}
    train(TrainConfig(**{**half, "max_steps": 4}, output_dir=tmp_path / "half"))
    run = {**constant, "output_dir": tmp_path / "run"}
    with monkeypatch.context() as patched:
        without_memory(patched, calls={1}, after=True)
        train(TrainConfig(**{**run, "max_steps": 2}))
    train(TrainConfig(**{**run, "max_steps": 4}, resume=True))
    assert contents(tmp_path / "run")["weights"] == contents(tmp_path / "half")["weights"]


def test_memory_that_runs_out_twice_in_a_step_ends_the_run(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_memory(monkeypatch, calls={1, 2}, after=False)
    with pytest.raises(DpoOptError, match="memory ran out again") as caught:
        train(TrainConfig(**settings, output_dir=tmp_path / "run"))
    assert caught.value.where == "step 1"
    assert "--resume --activation-checkpointing full" in str(caught.value.fix)


def test_an_evaluation_whose_memory_ran_out_is_repeated(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = importlib.import_module("dpo_opt.optimize.evaluation")
    forward_pairs, calls = evaluation.forward_pairs, 0

    def run_out(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        results = forward_pairs(*args, **kwargs)
        if calls == 1:
            raise torch.OutOfMemoryError("planted")
        return results

    listener = Listener()
    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "forward_pairs", run_out)
        train(TrainConfig(**settings, output_dir=tmp_path / "run"), progress=listener)
    assert listener.lines == [
        "memory ran out in the evaluation after step 3: it is repeated, and from here on micro-batches have "
        "at most 60 token rows, not 120"
    ]
    train(TrainConfig(**settings, output_dir=tmp_path / "undisturbed"))
    found, expected = contents(tmp_path / "run"), contents(tmp_path / "undisturbed")
    assert found["pair_logps"].keys() == expected["pair_logps"].keys()
    for name, rows in expected["pair_logps"].items():
        assert [row[:3] for row in found["pair_logps"][name]] == [row[:3] for row in rows]
    for line, same in zip(found["metrics"], expected["metrics"], strict=True):
        assert line == pytest.approx(same, rel=1e-3, abs=1e-5)
