"""What is judged: the different completions of each prompt, and how many were left out."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_opt.feedback.samples import read_samples
from dpo_opt.schemas.errors import ConfigError


class Candidates(NamedTuple):
    """The completions of one prompt."""

    prompt: str
    """What the model was shown, as text."""
    row: dict[str, Any]
    """What the data says: ``prompt``, and ``tools`` and ``chat_template_kwargs`` where it has them."""
    completions: list[str]
    """Different texts, none of them empty."""


class Gathered(NamedTuple):
    """All that is judged."""

    candidates: list[Candidates]
    """Prompts with at least two completions."""
    left_out: dict[str, int]
    """Why completions are not judged, and how many are not."""

    def digest(self) -> str:
        """SHA-256 of what is judged; the folders that it came from do not count."""
        digest = hashlib.sha256()
        for candidates in self.candidates:
            digest.update(json.dumps(candidates, sort_keys=True).encode() + b"\n")
        return digest.hexdigest()


def gather(folders: Sequence[Path], *, finished_only: bool) -> Gathered:
    """The completions of each prompt over all folders.

    Args:
        folders: Finished folders of completions.
        finished_only: Leave out those that the token limit cut off.

    Raises:
        ConfigError: One is no such folder, or nothing is left to compare.
        DataError: A part is missing or damaged.
    """
    found: dict[str, Candidates] = {}
    left_out: Counter[str] = Counter()
    for folder in folders:
        for sample in read_samples(folder):
            # Rows, and not ids: two models have ids of their own for the same prompt.
            own = found.setdefault(sample.row, Candidates(sample.prompt, json.loads(sample.row), []))
            if finished_only and not sample.finished:
                left_out["cut"] += 1
            elif not sample.completion.strip():
                left_out["empty"] += 1
            elif sample.completion in own.completions:
                left_out["repeated"] += 1
            else:
                own.completions.append(sample.completion)
    several = [candidates for candidates in found.values() if len(candidates.completions) > 1]
    left_out["alone"] = sum(len(c.completions) == 1 for c in found.values())
    if not several:
        raise ConfigError(
            f"no prompt of {len(found)} has two completions to compare ({dict(left_out)} left out)",
            why="a preference is between two completions of one prompt",
            fix="run `dpo-opt sample` with a larger --num-samples or a higher --temperature",
        )
    return Gathered(several, dict(left_out))
