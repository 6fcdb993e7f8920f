"""What a training run leaves on disk while it goes, in the names that existing notebooks read."""

import json
from collections.abc import Sequence
from pathlib import Path

from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.pair_logps import PairLogps, write_pair_logps
from dpo_opt.schemas.storage import write_text

# Rows of pair log-probs held before a segment is written: about 10 MB.
_SEGMENT_ROWS = 50_000

Metrics = dict[str, float | int]


class RunFolder:
    """Writer of ``metrics.jsonl``, ``trainer_state.json`` and ``pair_logps/``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._history: list[Metrics] = []
        self._rows: list[PairLogps] = []
        self._segments = 0

    @staticmethod
    def require_unused(path: Path) -> None:
        """Refuse to mix two runs.

        Raises:
            ConfigError: The folder holds something already.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(
                f"the output folder {path} is already in use",
                why="two runs in one folder could not be told apart",
                fix="pass another --output-dir, or remove the folder",
            )

    def create(self, config_yaml: str) -> None:
        """Make the folder with its resolved configuration."""
        write_text(self.path / "config.resolved.yaml", config_yaml)

    def write_parity(self, parity: dict[str, object]) -> None:
        """Keep the measured parity of policy and cached reference."""
        write_text(self.path / "parity.json", json.dumps(parity, indent=1) + "\n")

    def log(self, metrics: Metrics) -> None:
        """Append one line of metrics."""
        self._history.append(metrics)
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(metrics) + "\n")

    def add_pair_logps(self, rows: Sequence[PairLogps]) -> None:
        """Keep rows, writing a segment when enough are held."""
        self._rows += rows
        if len(self._rows) >= _SEGMENT_ROWS:
            self.flush_pair_logps()

    def flush_pair_logps(self) -> None:
        """Write the rows held so far as one segment."""
        if self._rows:
            write_pair_logps(self.path / "pair_logps" / f"{self._segments:05d}.parquet", [self._rows])
            self._segments += 1
            self._rows = []

    def finish(self, *, step: int, epoch: float, total_steps: int, num_train_epochs: int) -> None:
        """Write what is held, and the state in the form of transformers' ``trainer_state.json``."""
        self.flush_pair_logps()
        state = {
            "global_step": step,
            "epoch": epoch,
            "max_steps": total_steps,
            "num_train_epochs": num_train_epochs,
            "log_history": self._history,
        }
        write_text(self.path / "trainer_state.json", json.dumps(state, indent=1) + "\n")
