"""Completions made into ranked completions: joins a judge with the log of its answers."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from dpo_opt.feedback.judging.answer_log import ANSWERS, AnswerLog, has_answers
from dpo_opt.feedback.judging.candidates import Candidates, gather
from dpo_opt.feedback.judging.comparisons import (
    COMPARISONS_SCHEMA,
    Ask,
    Keep,
    all_questions,
    compare_all,
    questions_about,
)
from dpo_opt.feedback.judging.endpoint import Endpoint
from dpo_opt.feedback.judging.local_model import ask_model
from dpo_opt.feedback.judging.questions import Question
from dpo_opt.feedback.judging.ranked_rows import RANKED, write_ranked
from dpo_opt.feedback.judging.ratings import RATINGS_SCHEMA, Rate, rate_all, statistics
from dpo_opt.feedback.work_folder import begin_or_resume, require_own
from dpo_opt.precompute.engine.option_rules import read_engine_options
from dpo_opt.precompute.tokens.templates import chat_templates
from dpo_opt.precompute.tokens.tokenize import encoder, prompt_ids
from dpo_opt.schemas.errors import ConfigError, DataError
from dpo_opt.schemas.models import (
    checkpoint_dtype,
    config_digest,
    context_length,
    find_model,
    pinned_name,
)
from dpo_opt.schemas.pairs import IdArray, PreferencePair
from dpo_opt.schemas.plain_data import json_of
from dpo_opt.schemas.progress import Progress, Silent
from dpo_opt.schemas.storage import write_text
from dpo_opt.schemas.weights import weights_digest
from dpo_opt.scorers import make_engine
from dpo_opt.user_function import load_user_function

if TYPE_CHECKING:
    from dpo_opt.commands.judge import JudgeConfig

SUMMARY = "summary.json"
_Judged = tuple[list[list[float]], dict[str, Any]]


def judge(config: "JudgeConfig", *, progress: Progress | None = None) -> dict[str, Any]:
    """Judge completions, write ``ranked.jsonl``, and say how the judge did.

    Raises:
        ConfigError: The judge is missing, or there is nothing to compare.
        DataError: Completions are missing or damaged, a function returns no numbers, or no completion is
            better than another one of its prompt.
        FingerprintError: The folder is another judge's, or of other completions.
        DpoOptError: A server refuses, or does not answer.
    """
    progress = progress or Silent()
    gathered = gather(config.samples, finished_only=config.finished_only)
    prepared = _prepare(config)
    settings = {
        **prepared.identity,
        "finished_only": config.finished_only,
        "prompts": len(gathered.candidates),
        "samples_sha256": gathered.digest(),
    }
    require_own(config.output, settings, kind="judge", has_results=has_answers(config.output))
    with AnswerLog(config.output, prepared.schema) as log:
        # Only here, where no other process is at work with the settings that are there.
        begin_or_resume(config.output, settings, kind="judge", has_results=has_answers(config.output))
        scores, found = prepared.run(gathered.candidates, log, progress)
        log.finish()
    counts = write_ranked(config.output, gathered.candidates, scores)
    result = {
        "ranked": str(config.output / RANKED) if counts["rows"] else None,
        "answers": str(config.output / ANSWERS),
        "samples": [str(folder) for folder in config.samples],
        "prompts": len(gathered.candidates),
        "completions_left_out": gathered.left_out,
        **counts,
        **found,
    }
    write_text(config.output / SUMMARY, json.dumps(result, indent=1) + "\n")
    if not counts["rows"]:
        raise DataError(
            f"no completion is better than another one of its prompt ({len(gathered.candidates)} prompts)",
            where=str(config.output),
            why=f"there is nothing to train on; {SUMMARY} and {ANSWERS} say what the judge found",
            fix="pass another judge and another --output, or sample with a higher --temperature",
        )
    return result


def plan_judge(config: "JudgeConfig") -> dict[str, Any]:
    """What would be judged, and how much of it is not answered yet; writes nothing, asks nothing.

    Raises:
        ConfigError, DataError: As ``judge``.
    """
    gathered = gather(config.samples, finished_only=config.finished_only)
    candidates = gathered.candidates
    result = {
        "prompts": len(candidates),
        "completions": sum(len(c.completions) for c in candidates),
        "completions_left_out": gathered.left_out,
    }
    if config.judge_model is None:
        return result
    questions = all_questions(questions_about(candidates, criteria=config.criteria))
    characters = sum(len(message["content"]) for q in questions for message in q.messages)
    return {**result, "questions": len(questions), "characters_to_read": characters}


class _Judge(NamedTuple):
    """Who judges."""

    identity: dict[str, Any]
    """What decides its answers."""
    schema: pa.Schema
    """Of its answers."""
    run: Callable[[Sequence[Candidates], AnswerLog, Progress], _Judged]
    """Gives the score of each completion, and what a reader must know about the judge."""


def _prepare(config: "JudgeConfig") -> _Judge:
    if config.function is not None:
        return _function(config.function)
    if config.reward_model is not None:
        return _reward_model(config.reward_model, dtype=config.dtype)
    assert config.judge_model is not None
    if config.endpoint is not None:
        return _comparing(config, *_endpoint(config, config.endpoint, config.judge_model))
    return _comparing(config, *_chat_model(config, config.judge_model))


def _function(named: str) -> _Judge:
    function = load_user_function(named)

    def rate(some: Sequence[Candidates]) -> list[list[float]]:
        prompts = [c.prompt for c in some for _ in c.completions]
        numbers = iter(function(prompts, [text for c in some for text in c.completions]))
        return [[next(numbers) for _ in c.completions] for c in some]

    identity = {"judge": "function", "function": function.name, "sha256": function.sha256}
    return _rating(identity, lambda: rate)


def _reward_model(named: str, *, dtype: str) -> _Judge:
    folder = find_model(named)
    dtype = checkpoint_dtype(folder) if dtype == "auto" else dtype
    tokenizer = encoder(folder, needs_eos=False)

    def ids(c: Candidates, text: str) -> IdArray:
        """Prompt and completion as ``precompute`` would give them to this model, but that none is asked to
        have an EOS token: a classifier writes nothing.
        """
        is_text = isinstance(c.row["prompt"], str)
        completion: Any = text if is_text else [{"role": "assistant", "content": text}]
        pair = PreferencePair(0, chosen=completion, rejected=completion, source=None, where=named, **c.row)
        (found,) = tokenizer.encode([pair])
        if isinstance(found, DataError):
            raise found
        return np.concatenate([found.prompt, found.chosen])

    def loaded() -> Rate:
        from dpo_opt.optimize.reward_model import RewardModel

        model = RewardModel(folder, dtype=dtype)

        def rate(some: Sequence[Candidates]) -> list[list[float]]:
            rewards = iter(model.rewards([ids(c, text) for c in some for text in c.completions]))
            return [[next(rewards) for _ in c.completions] for c in some]

        return rate

    identity = {"judge": "reward model", **_identity(named, folder), "dtype": dtype}
    return _rating(identity, loaded)


def _rating(identity: dict[str, Any], loaded: Callable[[], Rate]) -> _Judge:
    def run(candidates: Sequence[Candidates], log: AnswerLog, progress: Progress) -> _Judged:
        scores = rate_all(candidates, loaded(), log, progress=progress)
        return scores, statistics(scores)

    return _Judge(identity, RATINGS_SCHEMA, run)


def _comparing(config: "JudgeConfig", ask: Ask, identity: dict[str, Any]) -> _Judge:
    def run(candidates: Sequence[Candidates], log: AnswerLog, progress: Progress) -> _Judged:
        return compare_all(candidates, ask, log, criteria=config.criteria, progress=progress)

    asked = {"criteria": config.criteria, "max_new_tokens": config.max_new_tokens}
    return _Judge({**identity, **asked}, COMPARISONS_SCHEMA, run)


def _endpoint(config: "JudgeConfig", url: str, model: str) -> tuple[Ask, dict[str, Any]]:
    fields = {"temperature": 0, "max_tokens": config.max_new_tokens}
    fields |= {name: _field(text) for name, text in config.request_option.items()}
    fields = {name: value for name, value in fields.items() if value is not None}
    endpoint = Endpoint(
        url,
        model=model,
        key_variable=config.key_variable,
        concurrency=config.concurrency,
        requests_per_minute=config.requests_per_minute,
        fields=fields,
    )
    # Not the URL: a server may come back at another port.
    return endpoint, {"judge": "endpoint", "model": model, "fields": fields}


def _field(text: str) -> Any:
    try:
        return json_of(text)
    except ValueError:
        return text


def _chat_model(config: "JudgeConfig", named: str) -> tuple[Ask, dict[str, Any]]:
    folder = find_model(named)
    dtype = checkpoint_dtype(folder) if config.dtype == "auto" else config.dtype
    options = read_engine_options(config.engine_option)
    tokenizer = encoder(folder)
    if not chat_templates(tokenizer.tokenizer):
        raise ConfigError(
            "the judge has no chat template",
            where=named,
            why="a question is a message, and only a template makes of it the text that the model knows",
            fix="pass --judge-model with a chat model, or save its chat_template.jinja in the folder",
        )

    def ask(questions: Sequence[Question], keep: Keep) -> None:
        if not questions:
            return
        date = tokenizer.template_date
        prompts = [
            prompt_ids(
                [dict(message) for message in question.messages],
                tokenizer.tokenizer,
                where=f"question {question.key}",
                date=date,
            )
            for question in questions
        ]
        longest = max(map(len, prompts)) + config.max_new_tokens
        context = context_length(folder)
        if context is not None and longest > context:
            raise ConfigError(
                f"the longest question and --max-new-tokens {config.max_new_tokens} take {longest} tokens, "
                f"the judge's context has {context}",
                fix="pass a smaller --max-new-tokens, or a --judge-model with a longer context",
            )
        ask_model(
            questions,
            keep,
            sampler=make_engine(
                folder, backend=config.backend, dtype=dtype, max_length=longest, engine_options=options
            ),
            prompts=prompts,
            decode=lambda ids: str(tokenizer.tokenizer.decode(ids, skip_special_tokens=True)),
            name=pinned_name(named, folder),
            max_new_tokens=config.max_new_tokens,
        )

    return ask, {
        "judge": "chat model",
        **_identity(named, folder),
        "dtype": dtype,
        "engine_options": options,
    }


def _identity(named: str, folder: Path) -> dict[str, Any]:
    """What a folder of answers says of a model."""
    return {
        "model": pinned_name(named, folder),
        "weights_sha256": weights_digest(folder),
        "config_sha256": config_digest(folder),
    }
