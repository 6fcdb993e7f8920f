"""Completions judged one by one: a user's function, or a reward model, gives each a number."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from dpo_opt.feedback.judging.answer_log import AnswerLog
from dpo_opt.feedback.judging.candidates import Candidates
from dpo_opt.schemas.progress import Progress

RATINGS_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("completion", pa.string(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
    ]
)

Rate = Callable[[Sequence[Candidates]], list[list[float]]]
"""A number for each completion of some prompts; larger is better."""

_PROMPTS_AT_ONCE = 64


def rate_all(
    candidates: Sequence[Candidates], rate: Rate, log: AnswerLog, *, progress: Progress
) -> list[list[float]]:
    """The score of each completion; those that were scored before are not scored again."""
    unknown = [c for c in candidates if any(_key(c, text) not in log.answers for text in c.completions)]
    done = len(candidates) - len(unknown)
    progress.start("rating", total=len(candidates), unit="prompts", done=done)
    for i in range(0, len(unknown), _PROMPTS_AT_ONCE):
        some = unknown[i : i + _PROMPTS_AT_ONCE]
        for c, scores in zip(some, rate(some), strict=True):
            for text, score in zip(c.completions, scores, strict=True):
                log.keep({"key": _key(c, text), "prompt": c.prompt, "completion": text, "score": score})
        progress.advance(len(some))
    progress.finish()
    return [[log.answers[_key(c, text)]["score"] for text in c.completions] for c in candidates]


def statistics(scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """What a reader of the ratings must know."""
    flat = [score for own in scores for score in own]
    return {
        "completions": len(flat),
        "mean_score": sum(flat) / len(flat),
        "mean_best_score": sum(map(max, scores)) / len(scores),
        "mean_worst_score": sum(map(min, scores)) / len(scores),
    }


def _key(candidates: Candidates, completion: str) -> str:
    parts = (candidates.prompt.encode(), completion.encode())
    return hashlib.sha256(b"".join(len(p).to_bytes(8, "little") + p for p in parts)).hexdigest()[:32]
