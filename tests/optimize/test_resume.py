"""A run that was stopped, however it was stopped, ends as the run that was not."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from bit_flips import flip
from training_runs import Interrupter, contents, without_saves
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_opt.optimize import TrainConfig, begin, train
from dpo_opt.optimize.checkpoint import checkpoints, saving
from dpo_opt.optimize.checkpoint.checkpoints import Best
from dpo_opt.optimize.evaluation import Evaluation, is_comparable, new_best
from dpo_opt.optimize.memory.budget import CPU_ROWS, Device, run_device
from dpo_opt.optimize.processes.distributed import World
from dpo_opt.optimize.run_folder import RunFolder
from dpo_opt.optimize.stop_signals import StopRequested, stop_signals
from dpo_opt.optimize.stream import PairStream
from dpo_opt.schemas.errors import ConfigError, DataError, DpoOptError, FingerprintError, Preempted
from dpo_opt.schemas.progress import Silent
from dpo_opt.schemas.run_layout import CONFIG
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.sidecars import WEIGHT, Column, write_column
from dpo_opt.schemas.storage import sha256_file

OPTIMIZER = "optimizer/state-00001-of-00001.safetensors"
STEPS = 6  # two epochs of 3 steps: 8, 8 and 6 of the pairs that are not held out


@pytest.fixture(scope="session")
def undisturbed(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run says when nobody stops it."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(TrainConfig(**settings, output_dir=run)).steps == STEPS
    return contents(run)


@pytest.fixture(scope="session")
def moments(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> int:
    """How often the loop asks whether to stop."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        counted = Interrupter(monkeypatch)
        train(TrainConfig(**settings, output_dir=tmp_path_factory.mktemp("counted") / "run"))
    return counted.asked


def steps_saved(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("share", [0.0, 0.13, 0.31, 0.5, 0.52, 0.77, 1.0])
def test_interrupted_equals_uninterrupted_bit_for_bit(
    settings: dict[str, Any],
    undisturbed: dict[str, Any],
    moments: int,
    share: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        Interrupter(patched, at=1 + round(share * (moments - 1)))
        with pytest.raises(Preempted) as caught:
            train(TrainConfig(**settings, output_dir=run))
    assert caught.value.exit_code == 75
    said = json.loads((run / "preempted.json").read_text())
    assert said["signal"] == "SIGUSR1"
    assert steps_saved(run)[-1:] == ([said["step"]] if said["step"] else [])
    assert str(caught.value).endswith(said["resume"])
    train(TrainConfig(**settings, output_dir=run, resume=True))
    assert contents(run) == undisturbed
    assert not (run / "preempted.json").exists()


def test_a_run_that_is_stopped_at_every_moment_still_ends_the_same(
    settings: dict[str, Any],
    undisturbed: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    stops = 0
    while True:
        try:
            with monkeypatch.context() as patched:
                # A few moments later each time, so that it gets on.
                Interrupter(patched, at=5 + 3 * stops)
                train(TrainConfig(**settings, output_dir=run, resume=stops > 0))
            break
        except Preempted:
            stops += 1
    assert stops >= 3
    assert contents(run) == undisturbed


def test_what_losses_keep_from_step_to_step_goes_on_bit_for_bit(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeping = {**settings, "loss_type": ["bco_pair", "beta_dpo"], "beta_dpo_filtered": 0.3, "save_steps": 1}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    with monkeypatch.context() as patched:
        counted = Interrupter(patched)
        train(TrainConfig(**keeping, output_dir=whole))
    with monkeypatch.context() as patched:
        Interrupter(patched, at=round(0.6 * counted.asked))
        with pytest.raises(Preempted):
            train(TrainConfig(**keeping, output_dir=stopped))
    train(TrainConfig(**keeping, output_dir=stopped, resume=True))
    assert contents(stopped) == contents(whole)
    states = [
        json.loads((run / "checkpoints" / f"step-{STEPS:08d}" / "training_state.json").read_text())
        for run in (whole, stopped)
    ]
    assert states[0]["running"] == states[1]["running"]
    assert (states[0]["running"]["steps"], states[0]["running"]["completions"]) == (STEPS, 2 * 44)
    assert states[0]["running"]["reward"] != 0


def stopped_at_step(run: Path, settings: dict[str, Any], step: int) -> Path:
    """A run whose process died, without a word, when ``step`` updates were made."""

    class Killed(BaseException):
        pass

    class Killer(Silent):
        def __init__(self) -> None:
            self.done = 0

        def advance(self, count: int, note: str = "") -> None:
            self.done += count
            if self.done == step:
                raise Killed

    with pytest.raises(Killed):
        train(TrainConfig(**settings, output_dir=run), progress=Killer())
    return run


class Listener(Silent):
    """Progress that remembers what it was told to say."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def rename_to(name: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(path.read_text().replace('"model.safetensors"', f'"{name}"'))


def change_record(**entries: object) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def lead_out(path: Path) -> None:
    elsewhere = path.rename(path.parents[3] / "weights")
    path.symlink_to(elsewhere)


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("model.safetensors", flip, "the bytes of model.safetensors changed"),
        (OPTIMIZER, flip, f"the bytes of {OPTIMIZER} changed"),
        ("training_state.json", flip, "the bytes of training_state.json changed"),
        (OPTIMIZER, truncate, f"{OPTIMIZER} has"),
        ("model.safetensors", Path.unlink, "model.safetensors is missing"),
        ("COMPLETE.json", Path.unlink, "COMPLETE.json is missing"),
        ("COMPLETE.json", truncate, "COMPLETE.json cannot be read"),
        (
            "COMPLETE.json",
            rename_to("../../metrics.jsonl"),
            "the file name '../../metrics.jsonl' does not stay inside",
        ),
        ("COMPLETE.json", change_record(step=3), "COMPLETE.json is that of step 3"),
        ("COMPLETE.json", change_record(files=[]), "COMPLETE.json does not name training_state.json"),
        ("COMPLETE.json", rename_to("x" * 300), f"{'x' * 300} is missing"),
        ("model.safetensors", lead_out, "the file is a link that leads out of the folder"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    settings: dict[str, Any],
    undisturbed: dict[str, Any],
    tmp_path: Path,
    file: str,
    damage: Callable[[Path], object],
    said: str,
) -> None:
    run = stopped_at_step(tmp_path / "run", settings, 5)
    assert steps_saved(run) == [3, 4]
    damage(run / "checkpoints" / "step-00000004" / file)
    listener = Listener()
    train(TrainConfig(**settings, output_dir=run, resume=True), progress=listener)
    assert listener.lines[0].startswith(f"skipping the damaged checkpoint step-00000004: {said}")
    assert listener.lines[1].startswith("continuing from step-00000003, 22 pairs into the run")
    assert contents(run) == undisturbed


def test_a_broken_line_of_metrics_is_named_before_anything_is_trained_and_its_fix_mends_it(
    settings: dict[str, Any], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    run = stopped_at_step(tmp_path / "run", settings, 4)
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(["{broken\n", *lines[1:]]))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    again = TrainConfig(**settings, output_dir=run, resume=True)
    with pytest.raises(DataError) as refused:
        train(again)
    assert refused.value.where == f"{metrics}:1"
    assert str(refused.value.fix).startswith("sed -i.bak 1d ")
    assert {path: path.read_bytes() for path in before} == before
    metrics.write_text("".join(lines[1:]))
    listener = Listener()
    train(again, progress=listener)
    assert listener.lines[0] == "gone since the checkpoint, and not written again: 1 line of metrics.jsonl"
    found = contents(run)
    assert found["metrics"] == undisturbed["metrics"][1:]
    assert found["pair_logps"] == undisturbed["pair_logps"]


def test_what_a_user_put_beside_checkpoints_and_log_probs_is_left_alone(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    run = stopped_at_step(tmp_path / "run", settings, 4)
    kept = run / "checkpoints" / "step-00000009-keep"
    kept.mkdir()
    (run / "pair_logps" / "mine.parquet").write_bytes(b"mine")
    train(TrainConfig(**settings, output_dir=run, resume=True))
    assert kept.is_dir()
    assert (run / "pair_logps" / "mine.parquet").read_bytes() == b"mine"


def as_it_lies(run: Path) -> dict[Path, tuple[int, ...]]:
    """All of a folder that a change would move; to read it changes the time of access alone."""
    stats = {path: path.stat() for path in run.rglob("*")}
    return {
        path: (stat.st_ino, stat.st_mode, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        for path, stat in stats.items()
    }


def test_a_folder_has_one_run_at_a_time(
    settings: dict[str, Any], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    run = stopped_at_step(tmp_path / "run", settings, 4)
    before = as_it_lies(run)
    other = RunFolder(run)
    other.claim()
    with pytest.raises(ConfigError, match="another run is at work") as refused:
        train(TrainConfig(**settings, output_dir=run, resume=True))
    assert refused.value.fix == "let it end, or pass another --output-dir"
    assert as_it_lies(run) == before
    other.close()
    train(TrainConfig(**settings, output_dir=run, resume=True))
    assert contents(run) == undisturbed


def test_of_two_new_runs_in_a_folder_at_once_one_goes_on(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = RunFolder(tmp_path / "run")
    claim = RunFolder.claim

    def begin_first(files: RunFolder) -> None:
        """Both looked whether the folder is in use; the other one is the first to begin it."""
        monkeypatch.setattr(RunFolder, "claim", claim)
        other.create("the other's", new=True)
        files.claim()

    for ended, said in ((False, "another run is at work"), (True, "already in use")):
        monkeypatch.setattr(RunFolder, "claim", begin_first)
        if ended:
            monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # as if a file system had no locks
        with pytest.raises(ConfigError, match=said):
            train(TrainConfig(**settings, output_dir=other.path))
        assert [path.name for path in other.path.iterdir()] == [CONFIG]
        assert (other.path / CONFIG).read_text() == "the other's"
        other.close()
        shutil.rmtree(other.path)


def test_where_no_checkpoint_is_whole_nothing_is_started_over(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    run = stopped_at_step(tmp_path / "run", settings, 3)
    flip(run / "checkpoints" / "step-00000002" / "model.safetensors")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(DataError, match="every checkpoint is damaged") as caught:
        train(TrainConfig(**settings, output_dir=run, resume=True))
    assert "step-00000002" in caught.value.what or "model.safetensors" in caught.value.what
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_run_without_checkpoint_starts_over_and_says_so(
    settings: dict[str, Any], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    run = stopped_at_step(tmp_path / "run", settings, 1)
    listener = Listener()
    train(TrainConfig(**settings, output_dir=run, resume=True), progress=listener)
    assert listener.lines == [f"no checkpoint in {run}: starting at step 0"]
    assert contents(run) == undisturbed


@pytest.mark.parametrize("moment", ["before the files", "before the last file", "before the name"])
def test_a_death_inside_a_save_leaves_the_checkpoint_before_it(
    settings: dict[str, Any],
    undisturbed: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    class Killed(BaseException):
        pass

    run = tmp_path / "run"
    saves = 0

    def dies(function: Callable[..., Any]) -> Callable[..., Any]:
        def run_or_die(*args: Any, **kwargs: Any) -> Any:
            nonlocal saves
            saves += 1
            if saves == 2:
                raise Killed
            return function(*args, **kwargs)

        return run_or_die

    with monkeypatch.context() as patched:
        # A process that dies cleans nothing up.
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)
        if moment == "before the files":
            patched.setattr(saving, "write_model", dies(saving.write_model))
        elif moment == "before the last file":
            patched.setattr(checkpoints, "_Complete", dies(checkpoints._Complete))
        else:
            replace = Path.replace
            patched.setattr(
                Path,
                "replace",
                lambda path, to: (dies_at(replace) if "step-" in path.name else replace)(path, to),
            )
            dies_at = dies
        with pytest.raises(Killed):
            train(TrainConfig(**settings, output_dir=run))
    assert [*(run / "checkpoints").glob(".step-*.tmp")]
    assert steps_saved(run) == [2]
    train(TrainConfig(**settings, output_dir=run, resume=True))
    assert not [*(run / "checkpoints").glob(".*")]
    assert contents(run) == undisturbed


def test_the_newest_and_the_best_checkpoint_are_kept(settings: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(TrainConfig(**{**settings, "save_steps": 1, "learning_rate": 1e-2}, output_dir=run))
    best = json.loads((run / "best.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert best["step"] == min(values, key=lambda step: values[step])
    assert set(steps_saved(run)) == {STEPS - 1, STEPS, best["step"]}


def test_a_best_by_another_metric_is_neither_the_best_nor_kept(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    often = {**settings, "save_steps": 1, "eval_steps": 1}
    run = stopped_at_step(tmp_path / "run", often, 3)
    assert json.loads((run / "best.json").read_text())["metric"] == "eval_loss"
    listener = Listener()
    changed = {**often, "metric_for_best_model": "eval_logps/chosen"}
    train(TrainConfig(**changed, output_dir=run, resume=True), progress=listener)
    assert "was the best by eval_loss" in listener.lines[1]
    best = json.loads((run / "best.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = {line["step"]: line["eval_logps/chosen"] for line in lines if "eval_loss" in line}
    since = {step: value for step, value in values.items() if step > 2}
    assert (best["metric"], best["step"]) == ("eval_logps/chosen", max(since, key=lambda step: since[step]))
    assert set(steps_saved(run)) == {STEPS - 1, STEPS, best["step"]}


def test_without_a_metric_no_best_is_left(settings: dict[str, Any], tmp_path: Path) -> None:
    often = {**settings, "save_steps": 1, "eval_steps": 1}
    run = stopped_at_step(tmp_path / "run", often, 3)
    train(TrainConfig(**{**often, "metric_for_best_model": None}, output_dir=run, resume=True))
    assert not (run / "best.json").exists()
    assert steps_saved(run) == [STEPS - 1, STEPS]


def test_a_best_is_comparable_on_the_same_pairs_only(shards: Path) -> None:
    stream = PairStream(ShardFolder.open(shards), eval_split=0.2)
    held_out, helpful = Evaluation(None, stream, None, False), Evaluation("helpful", stream, "a" * 64, False)
    renewed = Evaluation("helpful", stream, "b" * 64, False)
    best = new_best("eval_helpful_loss", 0.5, [held_out, helpful], step=3)
    assert is_comparable(best, "eval_helpful_loss", [helpful, held_out])
    assert not is_comparable(best, "eval_helpful_loss", [held_out, renewed])
    assert not is_comparable(best, "eval_loss", [held_out, helpful])
    # As a checkpoint of before has it: held-out prompts are the run's own for good.
    old = Best.model_validate({"metric": "eval_loss", "value": 0.5, "step": 3})
    assert is_comparable(old, "eval_loss", [held_out, helpful])


def test_a_checkpoint_is_a_model_that_transformers_loads(
    settings: dict[str, Any], tmp_path: Path, tiny_model: Path
) -> None:
    run = stopped_at_step(tmp_path / "run", settings, 3)
    path = run / "checkpoints" / "step-00000002"
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(path)("a b").input_ids
    start = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))
    card = (path / "README.md").read_text()
    assert "the starting policy" in card
    assert "| steps | 2 |" in card
    assert not [*path.rglob("*.bin"), *path.rglob("*.pt"), *path.rglob("*.pkl")]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"beta": 0.2}, ["beta: 0.1 then, 0.2 now"]),
        ({"loss_type": "simpo"}, ["loss_type: sigmoid then, simpo now"]),
        ({"seed": 1, "batch_size": 4}, ["seed", "batch_size"]),
        ({"eval_split": 0.3}, ["eval_split"]),
        ({"num_train_epochs": 3}, ["num_train_epochs", "with --lr-scheduler-type constant"]),
        ({"reference_differs": True}, ["reference_differs: False then, True now"]),
    ],
)
def test_other_settings_are_another_run(
    settings: dict[str, Any], tmp_path: Path, change: dict[str, Any], names: list[str]
) -> None:
    run = stopped_at_step(tmp_path / "run", settings, 3)
    with pytest.raises(ConfigError, match="started with other settings or other shards") as caught:
        train(TrainConfig(**{**settings, **change}, output_dir=run, resume=True))
    assert all(name in str(caught.value) for name in names)


def test_other_shards_are_another_run(settings: dict[str, Any], tmp_path: Path, bf16_shards: Path) -> None:
    run = stopped_at_step(tmp_path / "run", settings, 3)
    with pytest.raises(ConfigError, match="shards' dtype: float32 then, bfloat16 now"):
        train(TrainConfig(**{**settings, "shards": bf16_shards}, output_dir=run, resume=True))


def test_other_weights_of_pairs_are_another_run(settings: dict[str, Any], tmp_path: Path) -> None:
    shards = shutil.copytree(settings["shards"], tmp_path / "shards")
    settings = {**settings, "shards": shards}
    run = stopped_at_step(tmp_path / "run", settings, 3)
    write_column(shards, WEIGHT, Column(array("q", [0, 1]), array("d", [2.0, 0.5])))
    with pytest.raises(ConfigError, match="weights_and_margins: "):
        train(TrainConfig(**settings, output_dir=run, resume=True))
    # A checkpoint of a version that did not record them goes on, as it did then.
    state = checkpoints.find_checkpoint(run, print, World(0, 1, 0, torch.device("cpu"), None)).state
    unrecorded = state.data.model_copy(update={"weights_and_margins": ""})
    checkpoints.require_same_run(
        state.model_copy(update={"data": unrecorded}), data=state.data, settings=state.settings, run=run
    )


def test_the_reference_is_never_what_was_trained_since(settings: dict[str, Any], tmp_path: Path) -> None:
    run = stopped_at_step(tmp_path / "run", settings, 3)
    trained = run / "checkpoints" / "step-00000002"
    with pytest.raises(FingerprintError, match="weights"):
        train(TrainConfig(**{**settings, "model": str(trained)}, output_dir=run, resume=True))
    with pytest.raises(FingerprintError, match="weights"):
        train(TrainConfig(**{**settings, "model": str(trained)}, output_dir=tmp_path / "new"))


def test_settings_that_change_nothing_may_change(
    settings: dict[str, Any], undisturbed: dict[str, Any], tmp_path: Path, tiny_model: Path
) -> None:
    run = stopped_at_step(tmp_path / "run", settings, 3)
    shutil.copytree(tiny_model, tmp_path / "moved")
    changed = {**settings, "model": str(tmp_path / "moved"), "save_steps": 5, "save_total_limit": 3}
    train(TrainConfig(**changed, output_dir=run, resume=True))
    assert contents(run) == undisturbed


def test_a_run_that_ended_is_left_alone(
    settings: dict[str, Any], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = train(TrainConfig(**settings, output_dir=run))
    again = train(TrainConfig(**settings, output_dir=run, resume=True))
    assert (again.final, again.steps, again.last_metrics) == (first.final, STEPS, first.last_metrics)
    assert contents(run) == undisturbed


@pytest.mark.parametrize("warmup_steps", [0, 2, 4.5])
def test_a_run_at_a_constant_rate_may_be_made_longer(
    settings: dict[str, Any], tmp_path: Path, warmup_steps: float
) -> None:
    constant = {**settings, "lr_scheduler_type": "constant", "save_steps": 1, "warmup_steps": warmup_steps}
    train(TrainConfig(**constant, output_dir=tmp_path / "long"))
    train(TrainConfig(**{**constant, "num_train_epochs": 1}, output_dir=tmp_path / "run"))
    train(TrainConfig(**constant, output_dir=tmp_path / "run", resume=True))
    longer, long = contents(tmp_path / "run"), contents(tmp_path / "long")
    assert longer["weights"] == long["weights"]


def test_a_warm_up_that_is_a_share_of_all_steps_fixes_their_number(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    constant = {**settings, "lr_scheduler_type": "constant", "warmup_steps": 0.5}
    train(TrainConfig(**{**constant, "num_train_epochs": 1}, output_dir=run))
    with pytest.raises(ConfigError, match="num_train_epochs: 1 then, 2 now") as caught:
        train(TrainConfig(**constant, output_dir=run, resume=True))
    assert "--warmup-steps 0, 1 or more" in str(caught.value)


def test_a_run_that_is_to_end_before_its_checkpoint_ends_with_it(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    class Bounded(Listener):
        def advance(self, count: int, note: str = "") -> None:
            assert count == 3, "a step was made beyond the end"

    constant = {**settings, "lr_scheduler_type": "constant", "save_steps": 1, "logging_steps": 10}
    constant |= {"eval_steps": None}
    run = stopped_at_step(tmp_path / "run", constant, 4)
    assert steps_saved(run)[-1] == 3
    shorter = TrainConfig(**{**constant, "max_steps": 2}, output_dir=run, resume=True)
    progress = Bounded()
    result = train(shorter, progress=progress)
    assert "already past the 2 requested steps" in progress.lines[1]
    assert result.steps == 3
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [("loss" in line, "eval_loss" in line, line["step"]) for line in lines] == [
        (True, False, 3),
        (False, True, 3),
    ]
    assert result.last_metrics == lines[0]
    final, checkpoint = (
        AutoModelForCausalLM.from_pretrained(path)
        for path in (result.final, run / "checkpoints" / "step-00000003")
    )
    for parameter, other in zip(final.parameters(), checkpoint.parameters(), strict=True):
        assert torch.equal(parameter, other)
    again = Listener()
    assert train(shorter, progress=again).steps == 3
    assert "is already complete" in again.lines[0]


def without_in_state(checkpoint: Path, *names: str) -> None:
    """Leave out what a checkpoint of an earlier version does not say."""
    change_state(checkpoint, lambda said: {key: value for key, value in said.items() if key not in names})


def change_state(checkpoint: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    state, complete = checkpoint / "training_state.json", checkpoint / "COMPLETE.json"
    state.write_text(json.dumps(change(json.loads(state.read_text()))))
    record = json.loads(complete.read_text())
    (entry,) = (file for file in record["files"] if file["file"] == state.name)
    entry |= {"bytes": state.stat().st_size, "sha256": sha256_file(state)}
    complete.write_text(json.dumps(record))


def with_dtype(dtype: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda said: said | {"settings": said["settings"] | {"dtype": dtype}}


def test_a_state_that_no_run_has_is_refused_and_its_fix_goes_on(
    settings: dict[str, Any], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    run = stopped_at_step(tmp_path / "my run", settings, 5)
    newest = run / "checkpoints" / "step-00000004"
    change_state(newest, lambda said: said | {"at": said["at"] | {"consumed": -5}})
    again = TrainConfig(**settings, output_dir=run, resume=True)
    with pytest.raises(DataError, match=r"at\.consumed") as refused:
        train(again)
    assert str(refused.value.fix).endswith(f"rm -r '{newest}'")
    shutil.rmtree(newest)
    (run / "pair_logps" / "00000.parquet").unlink()
    listener = Listener()
    train(again, progress=listener)
    assert listener.lines[0] == "gone since the checkpoint, and not written again: pair_logps/00000.parquet"
    assert contents(run)["metrics"] == undisturbed["metrics"]


def test_on_another_kind_of_device_a_run_does_not_change_its_dtype(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    run = stopped_at_step(tmp_path / "run", settings, 3)
    assert "dtype: float32\n" in (run / CONFIG).read_text(), "auto would be another dtype elsewhere"
    checkpoint = run / "checkpoints" / "step-00000002"
    change_state(checkpoint, with_dtype("bfloat16"))  # as begun on a GPU
    with pytest.raises(ConfigError, match="dtype: bfloat16 then, float32 now"):
        train(TrainConfig(**settings, output_dir=run, resume=True))
    change_state(checkpoint, with_dtype("auto"))  # as earlier versions wrote it
    assert train(TrainConfig(**settings, output_dir=run, resume=True)).steps > 2


GPU = Device("cuda", 80 * 10**9)


@pytest.mark.parametrize(
    ("now", "change", "budget"),
    [
        (GPU, {}, 200),
        (Device("cuda", 80 * 10**9 - 2**20), {}, 200),
        (Device("cuda", 40 * 10**9), {}, 100),
        (Device("cpu", None), {}, 100),
        (GPU, {"activation_checkpointing": "full"}, 100),
        (GPU, {"micro_batch_tokens": 150}, 150),
    ],
)
def test_a_measured_budget_is_kept_where_it_was_measured(
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    now: Device,
    change: dict[str, Any],
    budget: int,
) -> None:
    measured = {**settings, "micro_batch_tokens": None}
    with monkeypatch.context() as patched:
        patched.setattr(begin, "run_device", lambda _: GPU)
        patched.setattr(begin, "choose_budget", lambda *_, **__: 200)
        run = stopped_at_step(tmp_path / "run", measured, 3)
    monkeypatch.setattr(begin, "run_device", lambda _: now)
    monkeypatch.setattr(begin, "choose_budget", lambda *_, **__: 100)
    listener = Listener()
    train(TrainConfig(**{**measured, **change}, output_dir=run, resume=True), progress=listener)
    said = json.loads((run / "checkpoints" / "step-00000006" / "training_state.json").read_text())
    assert said["micro_batch_tokens"] == budget
    assert (said["device"], said["device_bytes"]) == (now.type, now.memory)
    assert ("is chosen again: the run used 1 x cuda of 80.0 GB" in listener.lines[0]) == (budget == 100)


def test_a_budget_that_several_processes_measured_is_not_one_processs(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    run = stopped_at_step(tmp_path / "run", {**settings, "micro_batch_tokens": None}, 3)
    state = checkpoints.newest_checkpoint(run, print)
    assert state is not None
    config = TrainConfig(**{**settings, "micro_batch_tokens": None}, output_dir=run)
    said: list[str] = []
    alone = World(0, 1, 0, torch.device("cpu"), None)
    of_two = state.state.model_copy(update={"processes": 2})
    here = run_device(alone)
    assert begin.kept_budget(state.state, config, here, alone, said.append) == CPU_ROWS
    assert not said
    assert begin.kept_budget(of_two, config, here, alone, said.append) is None
    assert "2 x cpu" in said[0]


def test_a_checkpoint_that_does_not_say_where_it_was_made_is_gone_on_from(
    settings: dict[str, Any], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    run = stopped_at_step(tmp_path / "run", settings, 3)
    without_in_state(run / "checkpoints" / "step-00000002", "device", "device_bytes")
    listener = Listener()
    unsaid = {**settings, "micro_batch_tokens": None}
    train(TrainConfig(**unsaid, output_dir=run, resume=True), progress=listener)
    assert listener.lines == ["continuing from step-00000002, 16 pairs into the run"]
    assert contents(run) == undisturbed


def test_a_loss_that_is_not_finite_leaves_its_pairs_and_the_checkpoint(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    diverging = {**settings, "learning_rate": 1e30, "save_steps": 1}
    with pytest.raises(DpoOptError, match="not finite"):
        train(TrainConfig(**diverging, output_dir=run))
    pairs = [json.loads(line) for line in (run / "not-finite-step-00000002.jsonl").read_text().splitlines()]
    assert len(pairs) == 8
    assert any(isinstance(pair["loss"], str) for pair in pairs)
    assert all(pair["prompt_ids"] and pair["chosen_ids"] and pair["rejected_ids"] for pair in pairs)
    assert steps_saved(run) == [1]


def test_every_evaluation_has_its_metrics_and_its_log_probs(
    settings: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    for name in ("helpful", "harmless"):
        shutil.copytree(shards, tmp_path / name)
    run = tmp_path / "run"
    others = [tmp_path / "helpful", tmp_path / "harmless"]
    metric = "eval_helpful_rewards/accuracies"
    train(TrainConfig(**{**settings, "metric_for_best_model": metric, "eval_shards": others}, output_dir=run))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if "eval_loss" in line]
    assert len(evaluated) == 2
    for line in evaluated:
        assert line["eval_helpful_loss"] == line["eval_harmless_loss"] != line["eval_loss"]
        assert metric in line
    rows = pq.read_table(run / "pair_logps" / "helpful").to_pylist()
    assert [row["row"] for row in rows] == [*range(28)] * 2
    main = [row for file in (run / "pair_logps").glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    assert len({(row["row"], row["step"], row["phase"]) for row in main}) == len(main)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"metric_for_best_model": "loss"}, "pass one of: eval_loss, eval_rewards/chosen"),
        ({"eval_split": 0.0}, "pass --eval-split or --eval-shards"),
    ],
)
def test_a_metric_that_no_evaluation_gives_is_refused_at_once(
    settings: dict[str, Any], tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match="metric-for-best-model") as caught:
        train(TrainConfig(**{**settings, **change}, output_dir=tmp_path / "run"))
    assert said in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_evaluations_on_two_folders_of_one_name_are_refused(
    settings: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    shutil.copytree(shards, tmp_path / "a" / "x")
    shutil.copytree(shards, tmp_path / "b" / "x")
    folders = [tmp_path / "a" / "x", tmp_path / "b" / "x"]
    with pytest.raises(ConfigError, match="called 'x'"):
        train(TrainConfig(**settings, eval_shards=folders, output_dir=tmp_path / "run"))


def test_checkpoints_by_the_clock(settings: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    without = without_saves(settings)
    train(TrainConfig(**without, save_minutes=1e-9, output_dir=run))
    assert len(steps_saved(run)) == 2
    by_default = train(TrainConfig(**without, output_dir=tmp_path / "by default"))
    assert steps_saved(tmp_path / "by default") == [by_default.steps]
    # As in the resolved configuration of a run of before.
    train(TrainConfig(**without, save_minutes=None, output_dir=tmp_path / "never"))
    assert steps_saved(tmp_path / "never") == []


def test_signals_are_noted_and_the_handlers_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    alone = World(0, 1, 0, torch.device("cpu"), None)
    with stop_signals() as signals:
        signals.check(alone)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(StopRequested, match="SIGTERM"):
            signals.check(alone)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_the_one_that_is_not(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Real processes, SIGKILL and SIGTERM at random moments, also inside saves: every step is saved."""
    longer = {**settings, "num_train_epochs": 30, "learning_rate": 1e-4, "save_steps": 1, "eval_steps": 20}
    # A process too: what other tests did to the threads of this one may change the order of sums.
    ended(training_process(tmp_path / "undisturbed", longer))
    run = tmp_path / "run"
    chance = random.Random(5)
    rounds = int(os.environ.get("DPO_OPT_CHAOS_ROUNDS", "12"))
    kills: list[int] = []
    for number in [chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]) for _ in range(rounds)]:
        process = training_process(run, longer)
        before = max(steps_saved(run), default=0)
        while process.poll() is None and max(steps_saved(run), default=0) <= before:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.2)
        process.send_signal(number)
        said, _ = process.communicate(timeout=120)
        if process.returncode == 0:
            break
        # A signal that comes before the program listens does what it always does.
        assert process.returncode in (-signal.SIGKILL, -signal.SIGTERM, 75), said
        kills.append(max(steps_saved(run)))
    ended(training_process(run, longer))
    print(f"stopped after the steps {kills}, the same bits at the end")
    assert len(kills) >= min(rounds, 5)
    killed, undisturbed = contents(run), contents(tmp_path / "undisturbed")
    assert killed["metrics"] == undisturbed["metrics"]
    assert killed == undisturbed


def training_process(run: Path, settings: dict[str, Any]) -> subprocess.Popen[str]:
    """`dpo-opt train` in a process of its own, going on where there is something to go on from."""
    config = run.with_suffix(".yaml")
    settings = {**settings, "output_dir": run, "resume": True}
    config.write_text(yaml.safe_dump(TrainConfig(**settings).model_dump(mode="json")))
    return subprocess.Popen(
        [sys.executable, "-m", "dpo_opt", "train", "--config", str(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> None:
    """Wait for its end, which must be a good one."""
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
