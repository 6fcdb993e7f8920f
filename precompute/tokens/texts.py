"""What is tokenized of a pair: the prompt, and with either completion, and what counts of it."""

import itertools
import json
from typing import TYPE_CHECKING, NamedTuple, cast

from dpo_opt.precompute.config import TrainOn
from dpo_opt.precompute.read.strict_json import SKIP_ROW
from dpo_opt.precompute.tokens.faithful import Part, refuse_losses
from dpo_opt.precompute.tokens.hidden_losses import Beside, refuse_hidden_losses
from dpo_opt.precompute.tokens.stumbles import Conversation, explained
from dpo_opt.precompute.tokens.templates import Renderer
from dpo_opt.precompute.tokens.turns import Located, Span, counted_turns, spans_of
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import Message, PreferencePair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class PairTexts(NamedTuple):
    """A pair as text."""

    prompt: str
    chosen: str
    """Prompt and completion; so is ``rejected``."""
    rejected: str
    chosen_spans: list[Span] | None = None
    """What counts of the completion; None: all."""
    rejected_spans: list[Span] | None = None


def plain_texts(pair: PreferencePair, eos_text: str) -> PairTexts:
    """The texts of a pair of text."""
    prompt, chosen, rejected = cast(tuple[str, str, str], (pair.prompt, pair.chosen, pair.rejected))
    return PairTexts(prompt, prompt + _ended(chosen, eos_text), prompt + _ended(rejected, eos_text))


def _ended(text: str, eos_text: str) -> str:
    return text if text.endswith(eos_text) else text + eos_text


def texts_of_messages(
    pair: PreferencePair, tokenizer: "PreTrainedTokenizerFast", *, date: str | None, train_on: TrainOn
) -> PairTexts:
    """The texts of a pair of messages.

    Raises:
        ConfigError: The tokenizer has no chat template.
        DataError: The template refuses the messages, or a turn that counts cannot be found.
    """
    texts = PairTexts(*rendered_texts(pair, tokenizer, date=date))
    prompt, chosen, rejected = cast(
        tuple[list[Message], list[Message], list[Message]], (pair.prompt, pair.chosen, pair.rejected)
    )
    if len(chosen) == len(rejected) == 1:
        return texts
    render = Renderer(pair, tokenizer, date)
    turns = counted_turns(chosen, rejected, train_on, pair.where)
    chosen_spans, rejected_spans = (
        spans_of(Located(prompt + completion, len(prompt), text, pair.where, render), of_side)
        for completion, text, of_side in (
            (chosen, texts.chosen, turns[0]),
            (rejected, texts.rejected, turns[1]),
        )
    )
    return texts._replace(chosen_spans=chosen_spans, rejected_spans=rejected_spans)


def rendered_texts(
    pair: PreferencePair, tokenizer: "PreTrainedTokenizerFast", *, date: str | None = None
) -> tuple[str, str, str]:
    """A pair of messages as text: the prompt opened for generation, and with either completion.

    Args:
        pair: Its prompt and completions are messages.
        tokenizer: Its template renders them.
        date: What the template is told when it asks for the time; default today.

    Raises:
        ConfigError: The tokenizer has no chat template.
        DataError: The template refuses the messages, or renders the prompt's otherwise when one follows.
    """
    prompt, chosen, rejected = cast(
        tuple[list[Message], list[Message], list[Message]], (pair.prompt, pair.chosen, pair.rejected)
    )
    conversations = [prompt, prompt + chosen, prompt + rejected]
    rendered = Renderer(pair, tokenizer, date)
    try:
        opened, *wholes = rendered(conversations)
    except DataError as error:
        if error.kind != "template":
            raise
        raise _explained(error, rendered, prompt, {"chosen": chosen, "rejected": rejected}) from error
    parts = [Part("prompt", prompt, opened)]
    for side, messages, whole in zip(("chosen", "rejected"), (chosen, rejected), wholes, strict=True):
        before = opened
        if not whole.startswith(opened):
            # The prompt's end may be written for generation only; its messages may not change.
            _, before = rendered([prompt, prompt])
            if not whole.startswith(before):
                raise _other_prompt(before, whole, side, pair.where)
        parts.append(Part(side, messages, whole[len(before) :]))
    _refuse_all_losses(parts, pair, rendered)
    return opened, wholes[0], wholes[1]


def rendered_prompt(pair: PreferencePair, tokenizer: "PreTrainedTokenizerFast", *, date: str | None) -> str:
    """A prompt of messages as text, opened for generation; the completions do not count.

    Raises:
        ConfigError: The tokenizer has no chat template.
        DataError: The template refuses the messages, or leaves something out.
    """
    prompt = cast(list[Message], pair.prompt)
    rendered = Renderer(pair, tokenizer, date)
    try:
        (text,) = rendered([prompt])
    except DataError as error:
        if error.kind != "template":
            raise
        raise _explained(error, rendered, prompt, {}) from error
    _refuse_all_losses([Part("prompt", prompt, text)], pair, rendered)
    return text


def _refuse_all_losses(parts: list[Part], pair: PreferencePair, rendered: Renderer) -> None:
    settings = dict(pair.chat_template_kwargs or {})
    documents = settings.pop("documents", None)
    refuse_losses(parts, tools=pair.tools, documents=documents, template=rendered.template, where=pair.where)

    def write(messages: list[Message], tools: list[object] | None, documents: object, opened: bool) -> str:
        return rendered.beside(tools, documents)([messages], opens_first=opened)[0]

    beside = Beside(pair.tools, documents, json.dumps(settings, sort_keys=True))
    refuse_hidden_losses(parts, beside=beside, write=write, known=rendered.known, where=pair.where)


def _explained(
    refusal: DataError, rendered: Renderer, prompt: list[Message], completions: dict[str, list[Message]]
) -> DataError:
    """The refusal with what the template stumbled over: in the prompt, or else in the first side refused."""

    sides = [("prompt", []), *completions.items()]
    for side, completion in sides:
        conversation = Conversation(prompt, completion, side)

        def write(messages: list[Message], *, opened: bool = not completion) -> str:
            return rendered([messages], opens_first=opened)[0]

        try:
            write(conversation.messages)
        except DataError:
            return explained(refusal, conversation, write)
    return refusal


def _other_prompt(prompt: str, whole: str, side: str, where: str) -> DataError:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False))
    differs = sum(1 for _ in same)
    alone, followed = (repr(text[max(0, differs - 20) : differs + 30]) for text in (prompt, whole))
    return DataError(
        f"the chat template renders the prompt differently when {side} follows: "
        f"from character {differs + 1} on it is {followed}, alone {alone}",
        where=where,
        why="part of the prompt would be scored and trained on as if the model had said it",
        fix=f"{SKIP_ROW}; or use a template that renders prompt + completion as the prompt's own text and "
        "more: `dpo-opt preview DATA --model M` shows what is rendered",
        kind="template_mismatch",
    )
