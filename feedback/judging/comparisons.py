"""Completions judged two by two, each two in both orders, because judges prefer a place (Zheng et al. 2023,
arXiv 2306.05685, section 3.3: position bias, and swapping as its remedy).
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from dpo_opt.feedback.judging.answer_log import AnswerLog
from dpo_opt.feedback.judging.candidates import Candidates
from dpo_opt.feedback.judging.questions import Answer, Question, Verdict, ask_about, read_verdict
from dpo_opt.schemas.progress import Progress

COMPARISONS_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("request", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("verdict", pa.string()),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("served_model", pa.string(), nullable=False),
        pa.field("prompt_tokens", pa.int64()),
        pa.field("completion_tokens", pa.int64()),
    ]
)

Keep = Callable[[Question, Answer], None]
Ask = Callable[[Sequence[Question], Keep], None]
"""Asks questions, in any order, and hands over each answer as soon as it is there."""


class _Both(NamedTuple):
    """Two completions of a prompt, by their places, and the questions about them in both orders."""

    i: int
    j: int
    forward: Question
    """``i`` is shown first."""
    backward: Question


class Compared(NamedTuple):
    """The result."""

    scores: list[list[float]]
    """Of each completion: 1 for each other one that it is preferred to, 1/2 for each not told from it."""
    statistics: dict[str, Any]


def questions_about(candidates: Sequence[Candidates], *, criteria: str) -> list[list[_Both]]:
    """Every two completions of each prompt, in both orders: K completions make K(K-1) questions."""

    def both(c: Candidates, i: int, j: int) -> _Both:
        a, b = c.completions[i], c.completions[j]
        forward, backward = (ask_about(c.prompt, c.row, *ab, criteria=criteria) for ab in ((a, b), (b, a)))
        return _Both(i, j, forward, backward)

    return [
        [both(c, i, j) for i, j in itertools.combinations(range(len(c.completions)), 2)] for c in candidates
    ]


def all_questions(asked: Sequence[Sequence[_Both]]) -> list[Question]:
    """The different questions among them."""
    every = (q for own in asked for both in own for q in (both.forward, both.backward))
    return list({q.key: q for q in every}.values())


def compare_all(
    candidates: Sequence[Candidates], ask: Ask, log: AnswerLog, *, criteria: str, progress: Progress
) -> Compared:
    """Ask what was not asked before, and score the completions.

    A verdict counts where both orders give it. Where they contradict each other, where both say that the
    two are equally good, and where an answer cannot be read, the two completions are not told apart.
    """
    asked = questions_about(candidates, criteria=criteria)
    questions = all_questions(asked)
    todo = [question for question in questions if question.key not in log.answers]
    before = len(questions) - len(todo)
    progress.start("judging", total=len(questions), unit="answers", done=before)

    def keep(question: Question, answer: Answer) -> None:
        log.keep(
            {
                "key": question.key,
                "request": json.dumps(question.messages),
                "answer": answer.text,
                "verdict": read_verdict(answer.text),
                "finish_reason": answer.finish_reason,
                "served_model": answer.served_model,
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": answer.completion_tokens,
            }
        )
        progress.advance(1)

    ask(todo, keep)
    progress.finish()
    counts: Counter[str] = Counter()
    scores = [_scores(len(c.completions), own, log, counts) for c, own in zip(candidates, asked, strict=True)]
    return Compared(scores, {"asked": len(todo), "asked_before": before, **_summary(counts)})


def _scores(size: int, asked: Sequence[_Both], log: AnswerLog, counts: Counter[str]) -> list[float]:
    scores = [0.0] * size
    preferred: list[tuple[int, int]] = []
    for both in asked:
        forward, backward = (log.answers[q.key]["verdict"] for q in (both.forward, both.backward))
        counts["comparisons"] += 1
        counts["malformed"] += (forward is None) + (backward is None)
        counts["first"] += (forward == "A") + (backward == "A")
        counts["second"] += (forward == "B") + (backward == "B")
        outcome = _outcome(forward, backward)
        counts[outcome] += 1
        if outcome == "decided":
            better, worse = (both.i, both.j) if forward == "A" else (both.j, both.i)
            preferred.append((better, worse))
            scores[better] += 1
        else:
            scores[both.i] += 0.5
            scores[both.j] += 0.5
    counts["overruled"] += sum(scores[better] <= scores[worse] for better, worse in preferred)
    return scores


def _outcome(forward: Verdict | None, backward: Verdict | None) -> str:
    if forward is None or backward is None:
        return "unreadable"
    if forward == backward == "tie":
        return "ties"
    return "decided" if {forward, backward} == {"A", "B"} else "disagreements"


def _summary(counts: Counter[str]) -> dict[str, Any]:
    """Counts, and the position bias: how often the completion that is shown first is preferred."""
    picked = counts["first"] + counts["second"]
    read = counts["comparisons"] - counts["unreadable"]
    return {
        **{name: counts[name] for name in ("comparisons", "decided", "ties", "disagreements", "unreadable")},
        "malformed_answers": counts["malformed"],
        "agreement": (counts["decided"] + counts["ties"]) / read if read else None,
        "first_preferred": counts["first"],
        "second_preferred": counts["second"],
        "position_bias": counts["first"] / picked - 0.5 if picked else None,
        "overruled": counts["overruled"],
    }
