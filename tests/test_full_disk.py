"""A disk that is full at any of a command's files: what the message says goes on, goes on."""

import errno
import os
import shlex
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from command_line import invoke, printed
from fakes import preference_rows, write_jsonl

from dpo_opt.optimize.run_folder import RunFolder
from dpo_opt.schemas.storage import publish

Words = list[object]


@pytest.fixture(scope="module")
def scored(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and its shards."""
    base = tmp_path_factory.mktemp("full-disk")
    write_jsonl(base / "data.jsonl", preference_rows(8))
    printed(*precompute(base, base, tiny_model))
    printed(*train(base, base, tiny_model))
    return base


def precompute(base: Path, new: Path, model: Path) -> Words:
    own: Words = ["precompute", "--model", model, "--data", base / "data.jsonl", "--shards", new / "shards"]
    return [*own, "--backend", "hf", "--pairs-per-shard", 4]


def train(base: Path, new: Path, model: Path) -> Words:
    own: Words = ["train", "--shards", base / "shards", "--model", model, "--output-dir", new / "my run"]
    return [*own, "--max-steps", 2, "--batch-size", 2, "--eval-split", 0.6]


COMMANDS: dict[str, Callable[[Path, Path, Path], Words]] = {
    "precompute": precompute,
    "train": train,
    "train with checkpoints": lambda *places: [*train(*places), "--save-steps", 1],
    "convert": lambda base, new, _: ["convert", base / "data.jsonl", "--output", new / "clean"],
    "score": lambda base, new, model: [
        *("score", "--shards", base / "shards", "--model", model, "--output", new / "scores.parquet")
    ],
    "triage": lambda base, new, _: ["triage", "--shards", base / "shards", "--output", new / "t.parquet"],
    "report": lambda base, new, _: [
        *("report", base / "my run", "--output", new / "page.html", "--pairs", new / "pairs.parquet")
    ],
    "sample": lambda base, new, model: [
        *(
            "sample",
            "--prompts",
            base / "data.jsonl",
            "--model",
            model,
            "--output",
            new / "samples",
            "--backend",
            "hf",
        ),
        *("--num-samples", 1, "--max-new-tokens", 2),
    ],
    "check": lambda base, new, model: [
        *("check", base / "data.jsonl", "--model", model, "--html", new / "page.html")
    ],
}


class Disk:
    """A disk that takes so many files, and no more until it is emptied."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, files: int) -> None:
        self.left: int | None = files
        monkeypatch.setattr(os, "fsync", self._sync)

    def _sync(self, descriptor: int) -> None:
        """In place of ``os.fsync``, which is slow. The sync of a folder needs no room."""
        if self.left is None or not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return
        if self.left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.left -= 1


def go_on(command: Words, said: Result) -> None:
    """Do what the message of a full disk says."""
    assert said.exit_code == 1, said.output
    assert "the disk is full" in said.stderr
    (fix,) = (line.removeprefix("  fix: ") for line in said.stderr.splitlines() if line.startswith("  fix: "))
    space, _, then = fix.partition(", then ")
    assert space == "free some space there"
    printed(*(command if then == "run the same command again" else shlex.split(then)[1:]))


@pytest.mark.parametrize(
    ("name", "every"),
    [
        *((name, 1) for name in ("convert", "score", "triage", "sample", "check")),
        # A prime number meets every kind of file.
        ("precompute", 5),
        ("train with checkpoints", 5),
        *(
            pytest.param(name, 1, marks=pytest.mark.slow)
            for name in ("precompute", "train", "train with checkpoints", "report")
        ),
    ],
)
def test_what_a_full_disk_says_goes_on(
    name: str, every: int, scored: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every file, or at each so-many-th."""
    for files in range(0, 100, every):
        new = tmp_path / str(files)
        new.mkdir()
        command = COMMANDS[name](scored, new, tiny_model)
        disk = Disk(monkeypatch, files=files)
        said = invoke(*command)
        met, disk.left = disk.left == 0, None
        if said.exit_code == 0:
            break
        assert met
        go_on(command, said)
        shutil.rmtree(new)
    assert files > 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.ESTALE])
def test_what_a_disk_says_that_fails_at_a_line_of_metrics_goes_on(
    number: int, scored: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a file that is published: the system's own error."""
    with monkeypatch.context() as failing:

        def fail(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        failing.setattr(RunFolder, "log", fail)
        said = invoke(*train(scored, tmp_path, tiny_model))
    assert said.exit_code == 1
    resume = f"dpo-opt train --config '{tmp_path / 'my run' / 'config.resolved.yaml'}' --resume"
    (fix,) = (line for line in said.stderr.splitlines() if line.startswith("  fix: "))
    assert fix.endswith(f", then {resume}")
    printed(*shlex.split(resume)[1:])
    assert (tmp_path / "my run" / "final").is_dir()


def test_a_demo_on_a_full_disk_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        with publish(path / "config.json"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dpo_opt.demo._analyser", lambda: None)
    monkeypatch.setattr("dpo_opt.demo.smollm2_folder", fail)
    monkeypatch.setattr(sys, "argv", ["dpo-opt", "demo", "--output-dir", str(tmp_path / "my demo")])
    said = invoke("demo", "--output-dir", tmp_path / "my demo")
    assert said.exit_code == 1
    again = f"rm -r '{tmp_path}/my demo' && dpo-opt demo --output-dir '{tmp_path}/my demo'"
    assert f"  fix: free some space there, then {again}" in said.stderr


@pytest.mark.parametrize("worker", [True, False])
def test_a_launchers_worker_names_the_command_of_its_folder(
    worker: bool, scored: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a launcher started was typed by nobody."""
    command = [*precompute(scored, tmp_path, tiny_model)]
    if worker:
        command += ["--worker-index", 0, "--num-workers", 1]
    monkeypatch.setattr(sys, "argv", ["dpo-opt", *map(str, command)])
    Disk(monkeypatch, files=8)
    said = invoke(*command)
    resume = f"dpo-opt precompute --config {tmp_path}/shards/precompute.yaml --shards {tmp_path}/shards"
    then = resume if worker else "run the same command again"
    assert f"  fix: free some space there, then {then}" in said.stderr.splitlines()
