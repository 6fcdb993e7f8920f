"""bench/gpu.py on a tiny shape: that it runs, that all train the same thing, and what it counts as FLOPs."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"
ARGUMENTS = "--shapes tiny --mixes 12/8/6 --pairs-per-step 4 --steps 1 --micro-tokens 64 --micro-pairs 2"


def module(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """A script of the folder, which is no package."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module(name)


def rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], baseline: str, *others: str
) -> list[list[str]]:
    gpu = module(monkeypatch, "gpu")
    monkeypatch.setattr(sys, "argv", ["gpu.py", *ARGUMENTS.split(), "--baseline", baseline, *others])
    # A CPU that multiplies large matrices for seconds says nothing here.
    monkeypatch.setattr(gpu, "gemm_rate", lambda *_: 1e10)
    gpu.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize(
    "baseline",
    ["padded", pytest.param("trl", marks=pytest.mark.slow)],
)
def test_every_contender_starts_at_ln_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], baseline: str
) -> None:
    if baseline == "trl":
        pytest.importorskip("trl", reason="TRL is not installed: pip install trl==1.16.0 datasets")
    if torch.cuda.is_available():
        pytest.skip("on a CUDA device the figures are real; run bench/gpu.py itself")
    found = rows(monkeypatch, capsys, baseline)
    contenders = [
        "dpo-opt",
        baseline,
        "dpo-opt, checkpointing",
        f"{baseline}, checkpointing",
        "dpo-opt, nothing shared",
    ]
    # Each run, then the ratios.
    assert [row[2] for row in found] == 2 * contenders
    runs, ratios = found[:5], found[5:]
    assert {row[-1] for row in runs} == {"0.6931"}
    assert all(float(row[4]) > 0 and float(row[5]) > 0 for row in runs)
    assert "1.00x" in {ratios[1][5], ratios[3][5]}


def test_without_time_nothing_begins_and_each_run_that_is_left_out_has_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = rows(monkeypatch, capsys, "padded", "--seconds", "1")
    assert len(found) == 5
    assert all("left out: " in row[3] and row[3].endswith("s are left") for row in found)


def test_a_pair_is_worth_the_products_of_its_distinct_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = module(monkeypatch, "gpu_tasks")
    config = tasks.config_of("tiny")
    (pair,) = tasks.made_up_pairs("12/8/6", 1)
    cpu = torch.device("cpu")
    model = tasks.make_model(tasks.Task(config, [pair], 1, cpu, torch.float32, torch.float32), "sdpa")
    weights = sum(m.weight.numel() for m in model.base_model.modules() if isinstance(m, torch.nn.Linear))
    head = model.get_output_embeddings().weight.numel()
    # Row by row: a product and its two gradients, at 2 FLOPs each, per weight and per attended key.
    seen = [*range(12), *range(12, 20), *range(12, 18)]
    # Of an attended key, half a diagonal is left out on both sides of the equation.
    keys = sum(n + 0.5 for n in seen)
    per_key = 2 * 2 * config.hidden_size * config.num_hidden_layers
    expected = 3 * (2 * weights * 26 + per_key * keys + 2 * head * 14)
    assert tasks.model_flops(config, pair) == pytest.approx(expected)


def test_lengths_are_what_the_mix_says(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = module(monkeypatch, "gpu_tasks")
    fixed = tasks.made_up_pairs("7/5/3", 4)
    assert {(len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)) for p in fixed} == {(7, 5, 3)}
    spread = sorted(len(p.prompt_ids) for p in tasks.made_up_pairs("hh-like", 400))
    assert 60 < spread[200] < 120
    assert spread[380] > 2.5 * spread[200]
