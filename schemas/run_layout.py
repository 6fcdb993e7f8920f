"""What stands where in a run's folder, which training writes, scoring and `kl` add to, and analysis reads."""

import re
from pathlib import Path

CONFIG = "config.resolved.yaml"
METRICS = "metrics.jsonl"
STATE = "trainer_state.json"
PARITY = "parity.json"
PREEMPTED = "preempted.json"
BEST = "best.json"
CHECKPOINTS = "checkpoints"
COMPLETE = "COMPLETE.json"
"""In a checkpoint: its files with their hashes. It is written last, and removed first."""
TRAIN_STATE = "training_state.json"
"""In a checkpoint: how far the run had come."""
FINAL = "final"
PAIR_LOGPS = "pair_logps"
SCORES = "scores"
KL = "kl"

_STEP = re.compile(r"step-([0-9]{1,15})")


def checkpoint_path(run: Path, step: int) -> Path:
    """Folder of the checkpoint after ``step`` updates."""
    return run / CHECKPOINTS / f"step-{step:08d}"


def checkpoint_steps(run: Path) -> dict[Path, int]:
    """The checkpoints of a run with their steps, from the earliest on; also those that are damaged.

    A copy under another name, such as ``step-00000100-keep``, is the user's. So is one of a step that no run
    reaches, which no table has a place for.
    """
    found = {folder: _STEP.fullmatch(folder.name) for folder in sorted((run / CHECKPOINTS).glob("step-*"))}
    return {folder: int(step[1]) for folder, step in found.items() if step}


def whole_checkpoints(run: Path) -> dict[Path, int]:
    """Those that are not being removed."""
    return {folder: step for folder, step in checkpoint_steps(run).items() if (folder / COMPLETE).is_file()}
