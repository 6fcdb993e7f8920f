"""Asks a chat model in this process: each answer is made of the most likely tokens, so that it repeats."""

from collections.abc import Callable, Sequence

from dpo_opt.feedback.judging.comparisons import Keep
from dpo_opt.feedback.judging.questions import Answer, Question
from dpo_opt.schemas.pairs import IdArray, Sampler

# Few enough that little is lost when a run is stopped.
_AT_ONCE = 256


def ask_model(
    questions: Sequence[Question],
    keep: Keep,
    *,
    sampler: Sampler,
    prompts: Sequence[IdArray],
    decode: Callable[[list[int]], str],
    name: str,
    max_new_tokens: int,
) -> None:
    """Ask all questions.

    Args:
        questions: N questions.
        keep: Is given each answer.
        sampler: The model.
        prompts: (P,) for each question: what its chat template makes of it.
        decode: Ids to text without special tokens.
        name: What the model is called in the log of answers.
        max_new_tokens: Longest answer.

    Raises:
        EngineStopped: The engine broke.
    """
    for i in range(0, len(questions), _AT_ONCE):
        some = prompts[i : i + _AT_ONCE]
        written = sampler.sample(some, num_samples=1, max_new_tokens=max_new_tokens, temperature=0.0, seed=0)
        for question, prompt, (completion,) in zip(questions[i : i + _AT_ONCE], some, written, strict=True):
            answer = Answer(
                decode(completion.completion_ids.tolist()),
                "stop" if completion.finished else "length",
                name,
                len(prompt),
                len(completion.completion_ids),
            )
            keep(question, answer)
