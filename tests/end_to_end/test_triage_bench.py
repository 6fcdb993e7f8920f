"""bench/triage.py: its area and interval against the textbook, its smallest run with the real commands."""

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import polars as pl
import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The experiment, whose folder is no package."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("triage")


def test_the_area_is_the_share_of_ordered_pairs(bench: ModuleType) -> None:
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 9, 80).astype(float), rng.random(80) < 0.3
    higher = [(a > b) + (a == b) / 2 for a in scores[positive] for b in scores[~positive]]
    found = bench.auroc(scores, positive, starts=np.arange(80))
    assert found.value == pytest.approx(np.mean(higher))
    swapped = bench.auroc(-scores, positive, starts=np.arange(80))
    assert (swapped.low, swapped.high) == pytest.approx((1 - found.high, 1 - found.low))
    surely = bench.auroc(positive.astype(float), positive, starts=np.arange(80))
    assert surely == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("by_prompt", [True, False])
def test_the_interval_holds_the_truth_19_times_in_20_only_by_prompt(
    bench: ModuleType, by_prompt: bool
) -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        # Four pairs of a prompt are alike in score and label; neither knows the other.
        scores = np.repeat(rng.normal(size=60), 4) + 0.1 * rng.normal(size=240)
        positive = np.repeat(rng.random(60) < 0.3, 4)
        found = bench.auroc(scores, positive, starts=np.arange(0, 240, 4 if by_prompt else 1))
        held += found.low <= 0.5 <= found.high
    assert (held > 360) == by_prompt, held


def test_flips_are_a_tenth_and_of_their_seed(bench: ModuleType) -> None:
    first, second = bench.flipped(1), bench.flipped(2)
    assert len(first) == len(second) == bench.TRAINED / 10
    assert first != second
    assert bench.flipped(1) == first


@pytest.mark.slow
def test_the_smallest_run_finds_flips_that_a_reference_sees(
    bench: ModuleType, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("TRAINED", 60), ("HELD_OUT", 40), ("FLIPPED", 6), ("TRAINED_ON", ("answers",))):
        monkeypatch.setattr(bench, name, value)
    model = shared_data / "models" / "stories260K"
    for seed in (1, 2):
        bench.write_pairs("answers", seed, shared_data, tmp_path)
        found = bench.triaged("answers", seed, model, tmp_path)
        assert found["flipped"].sum() == 6
        for arm in bench.ARMS:
            bench.train(arm, "answers", seed, model, tmp_path)
    weights = {
        arm: pl.read_parquet(
            bench._run(tmp_path / "answers" / "seed-1", arm).with_name(f"{arm.replace(' ', '-')}-shards")
            / "columns" / "weight.parquet"
        )
        for arm in bench.ARMS[1:]
    }  # fmt: skip
    assert set(weights[bench.WITHOUT_FLIPPED]["row"]) == bench.flipped(1)
    assert (weights[bench.WITHOUT_SUSPECTS]["weight"] == 0).sum() == 6
    monkeypatch.setattr(bench, "TASKS", {"answers": bench.TASKS["answers"]})
    margins, perplexities, overlap = bench.found_table(tmp_path, model, [], [1, 2])[2:]
    assert float(perplexities.split("|")[4].split()[0]) > 0.7
    assert float(margins.split("|")[4].split()[0]) > 0.6
    assert "token overlap" in overlap
    gains = bench.gain_table(tmp_path, [1, 2])[2:]
    assert [line.split("|")[2].strip() for line in gains] == list(bench.ARMS)
    # Labels that are flipped in what is judged would turn this around.
    assert all(float(line.split("|")[3].split("%")[0]) > 60 for line in gains)
