"""Writes a run's folder: metrics, per-pair log-probs and state, under TRL's and transformers' names.

A stopped run continues from a checkpoint, so everything that was written after that checkpoint is removed: no
step is twice in the metrics, and no pair is twice in a step's log-probs.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from dpo_opt.optimize.metrics_lines import Metrics, is_line, is_whole, lines_until, newest_training_line
from dpo_opt.optimize.run_claim import claim_folder
from dpo_opt.schemas.counts import counted
from dpo_opt.schemas.errors import ConfigError, DataError, quoted
from dpo_opt.schemas.pair_logps import PairLogps, Phase, write_pair_logps
from dpo_opt.schemas.pairs import ScoredPair
from dpo_opt.schemas.plain_data import json_of
from dpo_opt.schemas.run_layout import BEST, CONFIG, FINAL, METRICS, PAIR_LOGPS, PARITY, PREEMPTED, STATE
from dpo_opt.schemas.storage import write_text

# Rows of pair log-probs held before a segment is written: about 10 MB.
_SEGMENT_ROWS = 50_000


class Written(NamedTuple):
    """How much of a run is on disk; a checkpoint records it."""

    lines: int
    """Lines of metrics.jsonl."""
    segments: dict[str, int]
    """Number of files of pair log-probs in each folder, relative to the run."""


class History(NamedTuple):
    """What a finished run logged, in its order."""

    training: list[Metrics]
    evaluations: list[Metrics]


class HeldLogps(NamedTuple):
    """Log-probs of a batch of pairs, still on the device, with the columns that the table of pairs needs."""

    pairs: list[tuple[int, str, int, int]]  # row, pair_id, length of chosen, length of rejected
    chosen_logps: Tensor
    rejected_logps: Tensor
    step: int
    epoch: float
    phase: Phase


def hold_logps(
    pairs: Sequence[ScoredPair],
    *,
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    step: int,
    epoch: float,
    phase: Phase,
) -> HeldLogps:
    """Keep what a batch's rows of the table of pairs need, without its token ids.

    Args:
        pairs: B pairs.
        chosen_logps: (B,) nats, on any device.
        rejected_logps: (B,) nats.
        step: Number of updates before this batch.
        epoch: Passes over the training pairs before this batch.
        phase: ``train`` or ``eval``.
    """
    names = [(p.row, p.pair_id, p.chosen_counted, p.rejected_counted) for p in pairs]
    return HeldLogps(names, chosen_logps, rejected_logps, step, epoch, phase)


def resume_command(run: Path) -> str:
    """The command that continues a run."""
    return f"dpo-opt train --config {quoted(run / CONFIG)} --resume"


class RunFolder:
    """Writer of ``metrics.jsonl``, ``trainer_state.json`` and ``pair_logps/``.

    Args:
        path: The run's folder.
        writes: False in all processes of a run except the first: all call the same methods, and one writes.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self._writes = writes
        self._lines = 0
        self._held: dict[str, list[HeldLogps]] = {}
        self._segments: dict[str, int] = {}
        self._claim: int | None = None

    @staticmethod
    def require_unused(path: Path) -> None:
        """Refuse a folder that is in use, so that two runs are never mixed.

        Raises:
            ConfigError: The folder is not empty.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            resumable = (path / CONFIG).is_file()
            raise ConfigError(
                f"the output folder {quoted(path)} is already in use",
                why="two runs in one folder could not be told apart",
                fix=f"to continue that run: {resume_command(path)}"
                if resumable
                else "pass another --output-dir, or remove the folder",
            )

    def claim(self) -> None:
        """Keep other runs of this machine out of the folder until ``close``; it is created.

        Raises:
            ConfigError: One is at work there.
        """
        if not self._writes or self._claim is not None:
            return
        self._claim = claim_folder(self.path)

    def close(self) -> None:
        """Let other runs into the folder."""
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

    def create(self, config_yaml: str, *, new: bool) -> None:
        """Create the folder and write its resolved configuration.

        Args:
            config_yaml: The configuration.
            new: Whether the folder must not have one.

        Raises:
            ConfigError: Another run is at work in the folder, or has begun it meanwhile.
        """
        if not self._writes:
            return
        self.claim()
        try:
            write_text(self.path / CONFIG, config_yaml, replace=not new)
        except FileExistsError:
            self.require_unused(self.path)
            raise

    def write_parity(self, parity: Mapping[str, object]) -> None:
        """Write parity.json: the measured parity of policy and cached reference."""
        self._write(PARITY, json.dumps(parity, indent=1) + "\n")

    def write_preempted(self, record: Mapping[str, object]) -> None:
        """Write preempted.json: a signal stopped the run. It is for scripts that do not see the exit code."""
        self._write(PREEMPTED, json.dumps(record, indent=1) + "\n")

    def write_best(self, record: Mapping[str, object]) -> None:
        """Write best.json: which checkpoint is the best so far."""
        self._write(BEST, json.dumps(record, indent=1) + "\n")

    def _write(self, name: str, text: str) -> None:
        if self._writes:
            write_text(self.path / name, text)

    def rewind(self, written: Written, *, step: int) -> list[str]:
        """Remove everything that was written after a checkpoint; returns what is gone of ``written``.

        Args:
            written: What was on disk when the checkpoint was made.
            step: Updates before the checkpoint. No line of a later step stays, also where lines were removed.

        Raises:
            DataError: A line of metrics is broken.
        """
        if not self._writes:
            return []
        lines = lines_until(self.path / METRICS, written.lines, step)
        for name in (PREEMPTED, BEST, STATE):
            (self.path / name).unlink(missing_ok=True)
        write_text(self.path / METRICS, "".join(lines))
        self._lines = len(lines)
        self._segments = dict(written.segments)
        for file in (self.path / PAIR_LOGPS).rglob("*.parquet"):
            folder = file.parent.relative_to(self.path).as_posix()
            # Another name is a file of the user's.
            if file.stem.isdecimal() and int(file.stem) >= self._segments.get(folder, 0):
                file.unlink()
        files = (f"{name}/{i:05d}.parquet" for name, count in written.segments.items() for i in range(count))
        lost = [name for name in files if not (self.path / name).is_file()]
        missing = written.lines - len(lines)
        return [f"{counted(missing, 'line')} of {METRICS}", *lost] if missing > 0 else lost

    def written(self) -> Written:
        """Write everything that is still held, and say how much is on disk."""
        self.flush_pair_logps()
        return Written(self._lines, dict(self._segments))

    def log(self, metrics: Metrics) -> None:
        """Append one line of metrics."""
        if not self._writes:
            return
        self._lines += 1
        with (self.path / METRICS).open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(metrics) + "\n")

    def add_pair_logps(self, batch: HeldLogps, *, evaluation: str | None = None) -> None:
        """Hold a batch's log-probs on their device, and write a segment when enough are held.

        Args:
            batch: From ``hold_logps``.
            evaluation: Name of the ``eval_shards`` folder that the pairs come from. Its row numbers are those
                of other shards, so its pairs get a folder of their own.
        """
        if not self._writes:
            return
        folder = f"{PAIR_LOGPS}/{evaluation}" if evaluation else PAIR_LOGPS
        held = self._held.setdefault(folder, [])
        held.append(batch)
        if sum(len(other.pairs) for other in held) >= _SEGMENT_ROWS:
            self._write_segment(folder)

    def flush_pair_logps(self) -> None:
        """Write the rows held so far, one segment per folder."""
        for folder in list(self._held):
            self._write_segment(folder)

    def _write_segment(self, folder: str) -> None:
        rows = [row for held in self._held.pop(folder) for row in _rows(held)]
        number = self._segments.get(folder, 0)
        write_pair_logps(self.path / folder / f"{number:05d}.parquet", [rows])
        self._segments[folder] = number + 1

    def finish(self, *, step: int, epoch: float, total_steps: int, num_train_epochs: int, dtype: str) -> None:
        """Write everything that is held, and ``trainer_state.json`` in transformers' form, with the dtype."""
        if not self._writes:
            return
        self.flush_pair_logps()
        with (self.path / METRICS).open(encoding="utf-8") as lines:
            history = [json.loads(line) for line in lines]
        state = {
            "global_step": step,
            "epoch": epoch,
            "max_steps": total_steps,
            "num_train_epochs": num_train_epochs,
            "dtype": dtype,
            "log_history": history,
        }
        write_text(self.path / STATE, json.dumps(state, indent=1) + "\n")

    def finished_step(self) -> int | None:
        """Number of updates of a finished run; None if the run is not finished.

        Raises:
            DataError: Its state is damaged.
        """
        if not ((self.path / FINAL).is_dir() and (self.path / STATE).is_file()):
            return None
        step: int = self._state()["global_step"]
        return step

    def history(self) -> History:
        """The lines of metrics of a finished run."""
        lines: list[Metrics] = self._state()["log_history"]
        training = [line for line in lines if "loss" in line]
        return History(training, [line for line in lines if "loss" not in line])

    def _state(self) -> dict[str, Any]:
        file = self.path / STATE
        try:
            state = json_of(file.read_text(encoding="utf-8"))
        except ValueError:
            state = None
        lines = state.get("log_history") if isinstance(state, dict) else None
        readable = isinstance(lines, list) and all(map(is_line, lines))
        if not readable or not is_whole(state.get("global_step")):
            raise DataError(
                "not the state of a finished run",
                where=str(file),
                why="it says after how many steps the run ended, and what it logged",
                fix=f"rm {quoted(file)}, then {resume_command(self.path)}, which writes it again",
            )
        found: dict[str, Any] = state
        return found

    def last_metrics(self) -> Metrics:
        """The newest line of training metrics; empty if there is none."""
        return newest_training_line(self.path / METRICS)

    def dump_pairs(
        self, pairs: Sequence[ScoredPair], numbers: Mapping[str, Sequence[float]], *, step: int
    ) -> Path:
        """Write a step's pairs with the values computed for each, so that a user can find what went wrong.

        Args:
            pairs: B pairs.
            numbers: Named (B,) values; those that are not finite are written as words.
            step: Number of updates before this step.

        Returns:
            The file's path. It has one JSON object per pair.
        """
        path = self.path / f"not-finite-step-{step + 1:08d}.jsonl"
        if not self._writes:
            return path
        lines = []
        for i, pair in enumerate(pairs):
            found = {name: values[i] for name, values in numbers.items()}
            record = {
                "row": pair.row,
                "pair_id": pair.pair_id,
                "source": pair.source,
                **{name: value if math.isfinite(value) else str(value) for name, value in found.items()},
                "ref_chosen_logps": pair.ref_chosen_logps,
                "ref_rejected_logps": pair.ref_rejected_logps,
                "prompt_ids": np.asarray(pair.prompt_ids).tolist(),
                "chosen_ids": np.asarray(pair.chosen_ids).tolist(),
                "rejected_ids": np.asarray(pair.rejected_ids).tolist(),
            }
            lines.append(json.dumps(record) + "\n")
        write_text(path, "".join(lines))
        return path


def _rows(held: HeldLogps) -> list[PairLogps]:
    return [
        PairLogps(
            row=row,
            pair_id=pair_id,
            step=held.step,
            epoch=held.epoch,
            phase=held.phase,
            chosen_logps=chosen,
            rejected_logps=rejected,
            chosen_length=chosen_length,
            rejected_length=rejected_length,
        )
        for (row, pair_id, chosen_length, rejected_length), chosen, rejected in zip(
            held.pairs, held.chosen_logps.tolist(), held.rejected_logps.tolist(), strict=True
        )
    ]
