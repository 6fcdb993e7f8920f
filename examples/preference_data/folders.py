"""Where everything lies below the output folder, and the commands that fill it.

experiment.yaml       the settings that the folder was begun with
pairs/                train.jsonl and eval.jsonl, cleaned and divided by prompt
prompts.jsonl         the held-out prompts that policies complete, each with its chosen completion
shards/train, eval    the reference's log-probs
run/                  the run of `dpo-opt train`: scores/ of held-out pairs, kl/ of its own samples
samples/              completions: chosen, and of each policy and temperature
judged/JUDGE/         what a judge said of each of them beside the chosen ones; JUDGE is a hash of its options
results.json, results.md
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from settings import Size

from dpo_opt.schemas.errors import ConfigError, DpoOptError, quoted
from dpo_opt.schemas.storage import write_text


class Work(NamedTuple):
    """One experiment at work in its folder."""

    size: Size
    folder: Path
    model: str
    """The reference, with which the policy begins."""

    @property
    def policy(self) -> Path:
        """The trained model."""
        return self.folder / "run" / "final"

    @property
    def prompts(self) -> Path:
        """The file of held-out prompts."""
        return self.folder / "prompts.jsonl"

    def samples(self, name: str) -> Path:
        """A folder of completions."""
        return self.folder / "samples" / name

    def judged(self, judge: Sequence[str]) -> Path:
        """A folder of what a judge said. Each has its own, so that no two judges are mixed."""
        digest = hashlib.sha256(json.dumps(list(judge)).encode()).hexdigest()
        return self.folder / "judged" / digest[:12]


def begin(work: Work, given: dict[str, object]) -> None:
    """Make the folder, or continue in one that the same settings began.

    Raises:
        ConfigError: It was begun with others, or holds other files.
    """
    text = yaml.safe_dump({**work.size.model_dump(mode="json"), "given": given}, sort_keys=False)
    file = work.folder / "experiment.yaml"
    if file.is_file() and file.read_text(encoding="utf-8") == text:
        return
    if work.folder.exists() and not work.folder.is_dir():
        raise ConfigError("it is a file, not a folder", where=str(work.folder), fix="pass a new --output")
    # A folder in which no step has left anything may be begun again, with a mistake corrected.
    if work.folder.is_dir() and any(path != file for path in work.folder.iterdir()):
        raise ConfigError(
            "the folder was begun otherwise",
            where=str(work.folder),
            why="its finished steps would be mixed with those of these settings",
            fix="pass a new --output, or the settings of experiment.yaml there",
        )
    work.folder.mkdir(parents=True, exist_ok=True)
    write_text(file, text)


def dpo_opt(*words: object, allowed: tuple[int, ...] = (0,)) -> None:
    """Run a command of dpo-opt, and say which.

    Raises:
        DpoOptError: It ended with another exit code than the allowed ones; it has said why.
    """
    arguments = [str(word) for word in words]
    print(f"$ dpo-opt {' '.join(map(quoted, arguments))}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "dpo_opt", *arguments], stdout=subprocess.DEVNULL, check=False
    )
    if done.returncode not in allowed:
        raise DpoOptError(
            f"`dpo-opt {arguments[0]}` ended with exit code {done.returncode}",
            fix="see above; then run the same command again",
        )
