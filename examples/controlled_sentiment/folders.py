"""Where everything lies below the output folder, and the commands that fill it.

experiment.yaml           the settings that the folder was begun with
prompts/                  train.jsonl, validation.jsonl, held_out.jsonl
sft/                      the model that all methods begin with, where it is fine-tuned here
seed-0/samples, judged, shards, reward_model
seed-0/runs               a folder for each run: those on pairs are runs of `dpo-opt train`
seed-0/validation, held_out    samples of each measured policy
learning_rates.json       what the validation rewards chose
points.parquet, claims.json, frontier.svg, results.md
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from settings import Experiment

from dpo_opt.schemas.errors import ConfigError, DpoOptError, quoted
from dpo_opt.schemas.storage import write_text

HERE = Path(__file__).parent


class Work(NamedTuple):
    """One experiment at work in its folder."""

    experiment: Experiment
    folder: Path
    """Absolute: names of runs hold paths of their shards."""
    reward: str
    """The ground truth, FILE.py:NAME."""
    environment: Mapping[str, str]
    """What its commands find in theirs, such as the corpus of the reward's classifier."""
    ppo_library: Path | None
    """Folder of packages with TRL's PPO."""

    @property
    def model(self) -> str:
        """The reference: where it is fine-tuned here that, else the model as it is."""
        if self.experiment.reviews is not None:
            return str(self.folder / "sft")
        assert self.experiment.model is not None
        return self.experiment.model

    def of_seed(self, seed: int) -> Path:
        """The folder of one repetition."""
        return self.folder / f"seed-{seed}"

    def prompts(self, split: str) -> Path:
        """The file of a split's prompts."""
        return self.folder / "prompts" / f"{split}.jsonl"


def begin(folder: Path, experiment: Experiment, given: Mapping[str, str | None]) -> None:
    """Make the folder, or continue in one that the same settings began.

    Raises:
        ConfigError: It was begun with others.
    """
    import yaml

    text = yaml.safe_dump({**experiment.model_dump(mode="json"), "given": dict(given)}, sort_keys=False)
    file = folder / "experiment.yaml"
    if file.is_file():
        if file.read_text(encoding="utf-8") != text:
            raise ConfigError(
                "the folder was begun with other settings",
                where=str(file),
                why="its finished steps would be mixed with those of these settings",
                fix="pass a new --output, or the settings that the file has",
            )
        return
    if folder.exists() and not folder.is_dir():
        raise ConfigError("it is a file, not a folder", where=str(folder), fix="pass a new --output")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            "the folder is not empty, and no experiment began it",
            where=str(folder),
            fix="pass a new --output",
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(file, text)


def dpo_opt(work: Work, *words: str | Path | int) -> None:
    """Run a command of dpo-opt, and say which.

    Raises:
        DpoOptError: It failed; it has said why.
    """
    run_python(work, "-m", "dpo_opt", *words, shown=f"dpo-opt {words[0]}")


def run_python(work: Work, *words: str | Path | int, shown: str, library: Path | None = None) -> None:
    """Run this Python with what the commands of an experiment need in their environment.

    Args:
        work: The experiment.
        words: Arguments.
        shown: What the user reads.
        library: A folder of packages that are found before all others.

    Raises:
        DpoOptError: It failed; it has said why.
    """
    arguments = [str(word) for word in words]
    first = [str(library)] if library else []
    paths = [*first, str(HERE), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, **work.environment, "PYTHONPATH": os.pathsep.join(paths)}
    print(f"$ {shown} {' '.join(map(quoted, arguments[3:]))}", flush=True)
    done = subprocess.run([sys.executable, *arguments], env=environment, check=False)
    if done.returncode != 0:
        raise DpoOptError(
            f"{shown} ended with exit code {done.returncode}",
            fix="see above; then run the same command again",
        )
