"""What the training benches share: their command line, contenders as processes of their own, and our side."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from measure import Measured, run

Job = Callable[..., dict[str, Any]]
SEED = 42  # of the order in which our side takes the pairs


class Trained(NamedTuple):
    """What an epoch of training took, in seconds on its process's clock."""

    preparing: float
    """Tokenizing, and scoring the reference where the trainer does that."""
    began: float
    """When the first step did."""
    ends: list[float]
    """Of each step."""
    losses: list[float]
    scored: int = 0
    """Batches whose reference was scored while the run was prepared, where the trainer does that."""


def command_line(documentation: str | None) -> argparse.ArgumentParser:
    """The options that the training benches have in common."""
    parser = argparse.ArgumentParser(description=documentation)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True, help="JSON lines with prompt, chosen, rejected")
    parser.add_argument("--trl-python", default=sys.executable, help="Python of an environment that has TRL")
    parser.add_argument("--pairs-per-step", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def do_job(arguments: argparse.Namespace, jobs: Mapping[str, Job]) -> bool:
    """In a process that ``run_job`` started: do it and print what came of it. False in any other."""
    if not arguments.contender:
        return False
    name, settings = json.loads(arguments.contender)
    print(json.dumps(jobs[name](arguments, **settings)))
    return True


def run_job(
    arguments: argparse.Namespace, name: str, *, checkout: Path | None = None, **settings: Any
) -> tuple[dict[str, Any], Measured]:
    """Do one of the bench's jobs in a process of its own, on the CPU; a job called ``trl`` in TRL's Python.

    With ``checkout`` the job imports that copy of the repository.

    Returns:
        What the job gave back, and what it took.

    Raises:
        SystemExit: It failed.
    """
    command = [arguments.trl_python if name == "trl" else sys.executable, sys.argv[0]]
    command += ["--contender", json.dumps([name, settings])]
    for option, value in vars(arguments).items():
        if option in ("contender", "trl_python") or value is None or value is False:
            continue
        command += ["--" + option.replace("_", "-")] + ([] if value is True else [str(value)])
    environment = {
        **os.environ,
        # Where TRL finds in every run what it scored in the first.
        "HF_HOME": str(arguments.folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        # The same number of threads for all.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0)))),
    }
    if checkout is not None:
        environment["PYTHONPATH"] = str(checkout)
    measured = run(command, environment=environment)
    return json.loads(measured.output.splitlines()[-1]), measured


def train_ours(arguments: argparse.Namespace, **settings: Any) -> Trained:
    """One epoch of ``dpo-opt train`` on the bench's shards; what ``settings`` does not name as it ships."""
    from dpo_opt.optimize import TrainConfig, train
    from dpo_opt.schemas.progress import Silent

    marks: list[float] = []

    class Clock(Silent):
        """When the first step began, and when each ended."""

        def start(self, what: str, *, total: int | None, unit: str, done: int = 0) -> None:
            marks.append(time.perf_counter())

        def advance(self, count: int, note: str = "") -> None:
            marks.append(time.perf_counter())

    output = arguments.folder / f"ours-{time.monotonic_ns()}"
    train(
        TrainConfig(
            shards=arguments.folder / "shards", model=str(arguments.model), output_dir=output, seed=SEED,
            batch_size=arguments.pairs_per_step, dtype="float32", logging_steps=1, **settings,
        ),
        progress=Clock(),
    )  # fmt: skip
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return Trained(0.0, marks[0], marks[1:], [json.loads(line)["loss"] for line in lines])


def write_pairs(source: Path, target: Path, count: int) -> None:
    """The first pairs of a file.

    Raises:
        SystemExit: It has fewer.
    """
    lines = source.read_text(encoding="utf-8").splitlines()[:count]
    if len(lines) < count:
        raise SystemExit(f"{source} has {len(lines)} pairs, {count} are needed")
    keys = ("prompt", "chosen", "rejected")
    rows = [{key: row[key] for key in keys} for row in map(json.loads, lines)]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
