"""bench/planted_causes.py on one seed of a few kinds: real texts, a trained model, the real commands."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
SEED = 11


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The experiment, whose folder is no package."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("planted_causes")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "control: answers",
        "learning rate / 1000",
        "near-identical pairs",
        "one poisoned source",
        "updates lost in a bf16 model",
        "fp16 training",
    ],
)
def test_the_first_finding_is_what_was_planted(
    name: str, bench: ModuleType, shared_data: Path, tmp_path: Path
) -> None:
    kind, model = bench.KINDS[name], shared_data / "models" / "stories260K"
    bench.run_kind(kind, tmp_path, data=shared_data, model=model, seed=SEED)
    found = bench.judge(kind, tmp_path)
    assert found["findings"][0] == kind.expected
    # What is done is not done again.
    (tmp_path / "pairs.jsonl").unlink()
    bench.run_kind(kind, tmp_path, data=shared_data, model=model, seed=SEED)
    assert bench.judge(kind, tmp_path) == found
    assert not (tmp_path / "pairs.jsonl").exists()


def test_another_cause_than_the_planted_one_counts_as_wrong(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = {"findings": ["swapped_labels"], "evidence": []}
    monkeypatch.setattr(bench, "judge", lambda *_: found)
    right, wrong = bench.table(tmp_path, ["10% of the labels swapped", "beta 0.005"], [1, 2])[2:]
    assert right.endswith("| 2 of 2 |")
    assert wrong.endswith("| 0 of 2 |")
