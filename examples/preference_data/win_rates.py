"""Win rates: how often the judge prefers a completion to the one that people chose for the same prompt."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from folders import Work, dpo_opt

from dpo_opt.analysis.intervals import Interval, wilson
from dpo_opt.feedback.samples import Sample, finished_parts, read_samples, write_part
from dpo_opt.feedback.work_folder import begin_or_resume
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import content_hash

CHOSEN = "chosen"


class WinRate(NamedTuple):
    """Of one policy at one temperature."""

    name: str
    temperature: float | None
    """None for Best-of-N, which samples at 1."""
    rate: Interval
    """Wins, and half of the ties, over prompts."""
    ties: int
    empty: int
    """Completions without a word, which lose."""
    prompts: int


def write_samples(work: Work, name: str, samples: Sequence[Sample]) -> None:
    """Write completions that `dpo-opt sample` did not write, in its form: one part, whole or not there."""
    folder, settings = work.samples(name), {"parts": 1, "made_by": name}
    begin_or_resume(folder, settings, kind="parts", has_results=bool(finished_parts(folder)))
    write_part(folder, 0, samples, settings)


def write_chosen(work: Work, like: Path) -> None:
    """The chosen completions as samples of the prompts of another folder."""
    if finished_parts(work.samples(CHOSEN)):
        return
    chosen = {}
    for line in work.prompts.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        chosen[json.dumps(row["prompt"])] = completion_text(row["chosen"])
    rows = [
        Sample(
            **{
                **_fields(sample),
                "completion": chosen[_prompt_of(sample)],
                "finished": True,
                "completion_ids": [],
            }
        )
        for sample in read_samples(like)
    ]
    write_samples(work, CHOSEN, rows)


def try_judge(work: Work, judge: Sequence[str]) -> None:
    """Have the judge compare two completions, unless it has judged some already.

    A wrong key, server or function is then known before anything is trained.

    Raises:
        DpoOptError: The judge cannot.
    """
    if any(work.judged(judge).glob("*/summary.json")):
        return
    with tempfile.TemporaryDirectory(prefix="judge-") as folder:
        trial = work._replace(folder=Path(folder))
        for name, answer in (("one", "The sky is blue."), ("two", "I do not know.")):
            write_samples(trial, name, [_answer("What colour is the sky?", answer)])
        both = ["--samples", trial.samples("one"), "--samples", trial.samples("two")]
        output = trial.folder / "judged"
        # It may prefer none of the two.
        dpo_opt("judge", *both, "--output", output, *judge, allowed=(0, DataError.exit_code))
        if not (output / "summary.json").is_file():
            raise DataError(
                "the judge could not compare two completions",
                why="after training it would be asked for every win rate",
                fix="see its message above, then run the same command with the judge's options corrected",
            )


def _answer(prompt: str, completion: str) -> Sample:
    return Sample(
        prompt_id=content_hash(np.array([0], dtype=np.int32)),
        sample=0,
        seed=0,
        prompt=prompt,
        completion=completion,
        finished=True,
        prompt_ids=[0],
        completion_ids=[],
        row=json.dumps({"prompt": prompt}),
    )


def win_rate(work: Work, name: str, temperature: float | None, judge: Sequence[str]) -> WinRate:
    """Judge a folder of completions beside the chosen ones."""
    output = work.judged(judge) / name
    both = ["--samples", work.samples(CHOSEN), "--samples", work.samples(name)]
    if not (output / "summary.json").is_file():
        # A judge that prefers none of them leaves no ranking, which here is a result.
        dpo_opt("judge", *both, "--output", output, *judge, allowed=(0, DataError.exit_code))
    if not (output / "summary.json").is_file():
        raise DataError("the judge did not finish", where=str(output), fix="see its message above")
    ranked = output / "ranked.jsonl"
    lines = ranked.read_text(encoding="utf-8").splitlines() if ranked.is_file() else []
    scores = {json.dumps(row["prompt"]): row["scores"] for row in map(json.loads, lines)}
    wins, empty = [], 0
    for sample in read_samples(work.samples(name)):
        # The chosen completion stands first; prompts without a preference are not in the file.
        first, second = scores.get(_prompt_of(sample), (0, 0))
        is_empty = not sample.completion.strip()
        empty += is_empty
        wins.append(0.0 if is_empty else float(second > first) + 0.5 * (second == first))
    rate = wilson(share=sum(wins) / len(wins), trials=len(wins))
    return WinRate(name, temperature, rate, wins.count(0.5), empty, len(wins))


def _fields(sample: Sample) -> dict[str, object]:
    return {name: getattr(sample, name) for name in Sample.__dataclass_fields__}


def _prompt_of(sample: Sample) -> str:
    return json.dumps(json.loads(sample.row)["prompt"])


def completion_text(completion: str | list[dict[str, object]]) -> str | None:
    """A completion's text: of messages that of the only one. None: they are several, or it has no text."""
    if isinstance(completion, str):
        return completion
    content = completion[0].get("content") if len(completion) == 1 else None
    return content if isinstance(content, str) else None
