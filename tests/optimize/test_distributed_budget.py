"""The budget of two real processes: they agree on it, and measure what a step takes, not less."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchrun_budget
from processes import free_port, start, torchrun
from safetensors.torch import load_file

PROGRAM = Path(torchrun_budget.__file__)


@pytest.fixture(scope="module")
def found(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budget")
    torchrun(2, str(PROGRAM), tiny_model, folder)
    return folder


def facts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"facts-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        ("smaller device", 0.85 * 3000),
        ("larger peaks", 0.85 * 3000),
        # No more than what fitted on both.
        ("out of memory", 600),
    ],
)
def test_processes_get_the_least_budget_of_all_by_equally_many_probes(
    found: Path, name: str, budget: float
) -> None:
    first, second = (each[name] for each in facts(found))
    assert first == second
    assert first[0] == pytest.approx(budget, abs=1)


def test_a_pair_that_is_too_long_for_one_device_is_refused_on_all(found: Path) -> None:
    first, second = (each["longest pair too long"] for each in facts(found))
    assert first == second
    assert "does not fit" in first[0]
    assert "0.1 GB are missing" in first[0]


def test_a_number_that_is_the_least_is_known_to_all(found: Path) -> None:
    assert [each["least"] for each in facts(found)] == [9, 9]


def test_a_probes_second_micro_batch_finds_the_whole_gradients_of_the_first(found: Path) -> None:
    for each in facts(found):
        before, between, after = each["gradients"]
        assert (before, between, after) == (0, 4 * each["parameters"], 0)


def test_a_probe_that_ran_out_of_memory_leaves_nothing_in_the_first_steps_gradients(found: Path) -> None:
    expected, after = (
        load_file(found / f"{name}.safetensors") for name in ("as it is", "after a probe that was broken off")
    )
    assert facts(found)[0]["broken off"] == 300
    assert expected.keys() == after.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, after[name]), name


def test_a_longest_pair_that_one_process_has_no_memory_for_is_refused_by_all() -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    both = [
        start(PROGRAM, "alone-without-memory", variables=address | {"RANK": str(rank), "WORLD_SIZE": "2"})
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=50)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2], said
    assert all("the longest pair (300 token rows) does not fit" in each for each in said)
