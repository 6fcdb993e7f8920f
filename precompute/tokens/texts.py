"""What is tokenized of a pair: the prompt, and with either completion, and what counts of it."""

from typing import TYPE_CHECKING, NamedTuple, cast

from dpo_opt.precompute.config import TrainOn
from dpo_opt.precompute.tokens.templates import Renderer, rendered_texts
from dpo_opt.precompute.tokens.turns import Located, Span, counted_turns, spans_of
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
