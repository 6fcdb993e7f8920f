"""One of two processes runs out of memory: all repeat the step or evaluation, in smaller micro-batches."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torchrun_memory
from processes import torchrun
from safetensors.numpy import load_file
from training_runs import without_saves

# Loss and micro-batch budget. In a step of the first two each process has several micro-batches; of the last,
# one, whose forward a loss of the whole step keeps.
LOSSES: dict[str, tuple[str, int]] = {
    "each pair": ("sigmoid", 120),
    "whole step": ("bco_pair", 120),
    "whole step, kept": ("bco_pair", 4000),
}
# Process, moment and times; see ``torchrun_memory``. The first step is also that of the parity.
MOMENTS = {
    "before a forward": (1, "to device", [1]),
    "forward": (0, "forward", [1]),
    "between": (1, "between", [1]),
    "backward": (1, "backward", [1]),
    "backward of a later micro-batch": (0, "backward", [2]),
}
QUICK = [
    ("each pair", "forward"),
    ("each pair", "between"),
    ("each pair", "backward of a later micro-batch"),
    ("whole step, kept", "backward"),
]
# The same in an evaluation, whose forwards have no backward.
EVALUATION_MOMENTS = {
    "evaluation, forward": (0, [1]),
    "evaluation, between": (1, [2]),
    "evaluation, before exchange": (1, [3]),
}
Listed = Sequence[tuple[dict[str, Any], int, str, list[int]]]


def start(
    folder: Path, settings: Mapping[str, Any], planted: Mapping[str, tuple[str, Any]], others: Listed = ()
) -> Path:
    """Runs of one step by name, and what each process said: undisturbed, in half, and planted; and others."""
    short = {**without_saves(dict(settings)), "shards": str(settings["shards"]), "max_steps": 1}
    short["logging_steps"] = 1

    def named(name: str, loss: str, **others: Any) -> dict[str, Any]:
        kind, budget = LOSSES[loss]
        return {
            **short,
            "output_dir": str(folder / name),
            "loss_type": [kind],
            "micro_batch_tokens": budget,
            **others,
        }

    listed = [*others]
    for loss in {loss for loss, _ in planted.values()}:
        half = LOSSES[loss][1] // 2
        listed.append((named(f"{loss}, undisturbed", loss), 0, "between", []))
        listed.append((named(f"{loss}, half", loss, micro_batch_tokens=half), 0, "between", []))
    listed += [(named(name, loss), *where) for name, (loss, where) in planted.items()]
    (folder / "runs.json").write_text(json.dumps(listed), encoding="utf-8")
    torchrun(2, torchrun_memory.__file__, folder / "runs.json")
    return folder


@pytest.fixture(scope="module")
def runs(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    planted = {f"{loss}, {moment}": (loss, MOMENTS[moment]) for loss, moment in QUICK}
    # The first time in the first try, then in the second, which has more micro-batches.
    planted["again"] = ("each pair", (1, "between", [1, 3]))
    folder = tmp_path_factory.mktemp("memory")
    return start(folder, settings, planted, evaluated(folder, settings))


def evaluated(folder: Path, settings: Mapping[str, Any]) -> Listed:
    """Runs of two steps with an evaluation after each: undisturbed, and planted."""
    short = {
        **without_saves(dict(settings)),
        "shards": str(settings["shards"]),
        "max_steps": 2,
        "logging_steps": 1,
        "eval_split": 0.2,
        "eval_steps": 1,
    }
    planted: dict[str, tuple[int, str, list[int]]] = {
        "evaluation, undisturbed": (0, "evaluation, forward", []),
        # The first time in the first try, then in the second.
        "evaluation, again": (1, "evaluation, between", [1, 2]),
    }
    planted |= {moment: (rank, moment, times) for moment, (rank, times) in EVALUATION_MOMENTS.items()}
    return [({**short, "output_dir": str(folder / name)}, *where) for name, where in planted.items()]


def said(folder: Path, name: str) -> list[list[str]]:
    return [json.loads((folder / f"said-{rank}.json").read_text())[name] for rank in (0, 1)]


def metrics(folder: Path, name: str) -> dict[str, float]:
    line: dict[str, float] = json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[0])
    return {key: value for key, value in line.items() if key != "pairs_per_second"}


def require_same(folder: Path, loss: str, name: str) -> None:
    """The update is bit by bit that of smaller micro-batches, and the undisturbed one but for rounding."""
    found, half, undisturbed = (
        load_file(folder / run / "final" / "model.safetensors")
        for run in (name, f"{loss}, half", f"{loss}, undisturbed")
    )
    for parameter, value in found.items():
        assert np.array_equal(value, half[parameter]), (name, parameter)
        assert np.linalg.norm(value - undisturbed[parameter]) < 1e-4 * np.linalg.norm(value), (
            name,
            parameter,
        )
    assert metrics(folder, name) == metrics(folder, f"{loss}, half")
    assert metrics(folder, name) == pytest.approx(metrics(folder, f"{loss}, undisturbed"), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("loss", "moment"), QUICK)
def test_a_step_is_repeated_with_the_same_update_where_one_process_ran_out_of_memory(
    runs: Path, loss: str, moment: str
) -> None:
    require_same(runs, loss, f"{loss}, {moment}")
    rank, budget = MOMENTS[moment][0], LOSSES[loss][1]
    assert said(runs, f"{loss}, {moment}")[0] == [
        f"memory ran out on process {rank} in step 1: it is repeated, and from here on micro-batches have at "
        f"most {budget // 2} token rows, not {budget}"
    ]
    assert said(runs, f"{loss}, undisturbed")[0] == []


def test_memory_that_runs_out_twice_in_a_step_ends_all_processes_alike(runs: Path) -> None:
    first, second = said(runs, "again")
    assert first[-1:] == second
    assert re.search(
        "memory ran out again on process 1, in micro-batches of at most 60 token rows", second[0]
    )
    assert "--activation-checkpointing full" in second[0]
    assert not (runs / "again" / "final").exists()


def lines_and_rows(run: Path) -> tuple[list[dict[str, float]], list[tuple[int, int]]]:
    """A run's metrics but for its speed; step and row of all pairs that it evaluated."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [
        (row["step"], row["row"])
        for file in sorted((run / "pair_logps").rglob("*.parquet"))
        for row in pq.read_table(file).to_pylist()
        if row["phase"] == "eval"
    ]
    return [{k: v for k, v in line.items() if k != "pairs_per_second"} for line in lines], rows


@pytest.mark.parametrize("moment", EVALUATION_MOMENTS)
def test_an_evaluation_is_repeated_where_one_process_ran_out_of_memory(runs: Path, moment: str) -> None:
    assert said(runs, moment)[0] == [
        f"memory ran out on process {EVALUATION_MOMENTS[moment][0]} in the evaluation after step 1: it is "
        "repeated, and from here on micro-batches have at most 60 token rows, not 120"
    ]
    assert said(runs, "evaluation, undisturbed")[0] == []
    (lines, rows), (expected, all_rows) = (
        lines_and_rows(runs / run) for run in (moment, "evaluation, undisturbed")
    )
    assert len(set(all_rows)) == len(all_rows) > 0
    assert rows == all_rows
    assert sum("eval_loss" in line for line in expected) == 2
    assert [line.keys() for line in lines] == [line.keys() for line in expected]
    for found, undisturbed in zip(lines, expected, strict=True):
        assert found == pytest.approx(undisturbed, rel=1e-4, abs=1e-6)


def test_memory_that_runs_out_twice_in_an_evaluation_ends_all_processes_alike(runs: Path) -> None:
    first, second = said(runs, "evaluation, again")
    assert first[-1:] == second
    assert "memory ran out again on process 1, in micro-batches of at most 60 token rows" in second[0]
    assert "the evaluation after step 1" in second[0]
    assert "--resume --micro-batch-tokens 30" in second[0]
    lines, rows = lines_and_rows(runs / "evaluation, again")
    assert (rows, [line for line in lines if "eval_loss" in line]) == ([], [])
    assert not (runs / "evaluation, again" / "final").exists()


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_memory_may_run_out_before_and_after_every_exchange(
    settings: dict[str, Any], tmp_path: Path, loss: str
) -> None:
    """Each of the first micro-batches' exchanges of parameters and gradients; 8 in one that is the last."""
    several = loss != "whole step, kept"
    planted = {
        f"{when} {number}": (loss, (1, f"{when} exchange", [number]))
        for when in ("before", "after")
        for number in range(1, 17 if several else 9)
    }
    planted |= {moment: (loss, where) for moment, where in MOMENTS.items() if several or where[2] == [1]}
    start(tmp_path, settings, planted)
    for name in planted:
        require_same(tmp_path, loss, name)
        assert len(said(tmp_path, name)[0]) == 1, name
