"""Training runs as tests look at them: what a run says, and how it is interrupted."""

import json
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from dpo_opt.optimize.processes.distributed import World
from dpo_opt.optimize.stop_signals import StopSignals


def contents(run: Path) -> dict[str, Any]:
    """All that a finished run says, but for its speed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    tables = {
        str(file.parent.relative_to(run)): sorted(
            (row["phase"], row["step"], row["row"], row["chosen_logps"], row["rejected_logps"])
            for other in file.parent.glob("*.parquet")
            for row in pq.read_table(other).to_pylist()
        )
        for file in (run / "pair_logps").rglob("*.parquet")
    }
    (file,) = (run / "final").glob("*.safetensors")  # of a model or an adapter
    weights = load_file(file)
    return {
        "metrics": [{k: v for k, v in line.items() if k != "pairs_per_second"} for line in lines],
        "pair_logps": tables,
        "weights": {name: value.numpy().tobytes() for name, value in weights.items()},
        "best": json.loads((run / "best.json").read_text()),
    }


def without_saves(settings: dict[str, Any]) -> dict[str, Any]:
    """A run that saves at its end only, by default."""
    never = {"save_steps": None, "metric_for_best_model": None, "eval_split": 0.0, "eval_steps": None}
    return {**settings, **never}


class Interrupter:
    """A signal at the n-th moment at which the loop asks for one; every micro-batch is such a moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, at: int = 0) -> None:
        self.asked = 0
        check = StopSignals.check

        def counting(signals: StopSignals, world: World, *, due: bool = False) -> bool:
            self.asked += 1
            if self.asked == at:
                signal.raise_signal(signal.SIGUSR1)
            return check(signals, world, due=due)

        monkeypatch.setattr(StopSignals, "check", counting)
