"""Text to token ids: one policy, applied once, before the reference scores and the policy trains.

Scoring and training on ids that were cut or rendered differently is the most common silent error of
precomputed references; here ids are made in one place, and readers of the shards never tokenize.

The policy, version ``TEXT_TO_IDS``:

1. Text: the EOS token's text is appended to a completion that does not end with it. Prompt and
   prompt + completion are tokenized whole, by the tokenizer's own call, with the special tokens it adds.
   Messages: the chat template renders the prompt with the generation prompt, and prompt + completion
   without it; what it renders is tokenized without further special tokens.
2. The prompt's ids are those which the tokenized prompt and both tokenized sequences begin with in common;
   what follows them is completion. Text on both sides of the boundary may merge into one token, and a
   template may render a prompt differently when something follows it: those tokens count as completion.
3. ``truncation`` makes each sequence fit ``max_length``, or leaves the pair out.

Differences from TRL 1.16, which gives the same ids otherwise:

* ``keep_end`` takes the same tokens from the start of the prompt for both sides, as many as the longer side
  needs, and never touches a completion. TRL cuts each side by itself, so that chosen and rejected answer
  different prompts, and a long completion loses its own beginning.
* A pair without a signal is dropped and counted: equal completions, before or after truncation; a completion
  or a prompt without a token. TRL keeps those rows; their gradient is zero, or a first token has no log-prob.
* ``drop`` does not exist in TRL. ``tools`` and ``chat_template_kwargs`` columns are not read.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, assert_never, cast

import numpy as np

from dpo_opt.schemas.errors import ConfigError, DataError
from dpo_opt.schemas.pairs import IdArray, Message, PreferencePair, Text, TokenizedPair
from dpo_opt.schemas.shards import DroppedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXT_TO_IDS = "1"
"""Changes whenever the same text could become other ids, or another pair could be dropped."""

Truncation = Literal["keep_start", "keep_end", "drop"]

DropReason = Literal[
    "empty_prompt",
    "empty_completion",
    "identical_completions",
    "prompt_fills_max_length",
    "completion_fills_max_length",
    "longer_than_max_length",
    "identical_after_truncation",
]

DROP_REASONS: dict[DropReason, str] = {
    "empty_prompt": "the prompt has no token, so nothing predicts a completion's first token",
    "empty_completion": "a completion has no token of its own: its sequence is the beginning of the prompt's",
    "identical_completions": "chosen and rejected are the same ids, so the pair prefers nothing",
    "prompt_fills_max_length": "keep_start: the prompt leaves no room for a completion token",
    "completion_fills_max_length": "keep_end: a completion leaves no room for a prompt token",
    "longer_than_max_length": "drop: a sequence is longer than max_length",
    "identical_after_truncation": "keep_start: what made the completions differ was cut off",
}
"""Why a row was left out, in the order in which the reasons are tried."""

_LONGEST_TEMPLATE_MESSAGE = 120


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """The fast tokenizer in a model folder, without running code from it.

    Raises:
        ConfigError: There is none, it cannot be read, it is a slow one, or it has no EOS token.
    """
    from transformers import AutoTokenizer

    fix = "put the model's own tokenizer there: AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)"
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(
            "there is no tokenizer.json",
            where=str(folder),
            why="without it transformers builds a tokenizer with an empty vocabulary and says nothing",
            fix=fix,
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"the tokenizer cannot be loaded ({reason})", where=str(folder), fix=fix) from error
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{type(tokenizer).__name__} is not a fast tokenizer",
            where=str(folder),
            why="a slow one has no serialization to fingerprint",
            fix="use a model whose tokenizer has a tokenizer.json that transformers loads as it is",
        )
    if tokenizer.eos_token is None:
        raise ConfigError(
            "the tokenizer has no EOS token",
            where=str(folder),
            why="a completion must end with it, or the model never learns to stop",
            fix='set "eos_token" in tokenizer_config.json',
        )
    return tokenizer


def chat_template(tokenizer: "PreTrainedTokenizerFast") -> str | None:
    """The template that renders messages, None where the tokenizer has none."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        return None


def prompt_ids(prompt: Text, tokenizer: "PreTrainedTokenizerFast", *, where: str) -> IdArray:
    """Ids of a prompt alone, as a completion is sampled from it.

    Raises:
        ConfigError: The prompt holds messages and the tokenizer has no chat template.
        DataError: The chat template refuses the messages.
    """
    if isinstance(prompt, str):
        return np.array(tokenizer(prompt)["input_ids"], dtype=np.int32)
    rendered = _render([prompt], tokenizer, where=where)
    return np.array(tokenizer(rendered, add_special_tokens=False)["input_ids"][0], dtype=np.int32)


class PairTokenizer:
    """Turns pairs into ids by one policy.

    Args:
        tokenizer: The reference's tokenizer.
        max_length: Most tokens of prompt plus completion.
        truncation: What is done with a longer sequence.
        vocab_size: Number of ids the model knows.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        max_length: int,
        truncation: Truncation,
        vocab_size: int,
    ) -> None:
        self.tokenizer = tokenizer
        self._max_length = max_length
        self._truncation: Truncation = truncation
        self._vocab_size = vocab_size

    def __call__(self, pair: PreferencePair) -> TokenizedPair | DroppedRow:
        """A pair's ids, or why it is left out.

        Raises:
            ConfigError: The pair holds messages and the tokenizer has no chat template.
            DataError: The chat template refuses the messages, or an id is outside the vocabulary.
        """
        prompt, chosen, rejected = _encode(pair, self.tokenizer)
        _refuse_foreign_ids(pair, np.concatenate([chosen, rejected]), vocab_size=self._vocab_size)
        boundary = min(_common_prefix_length(prompt, chosen), _common_prefix_length(prompt, rejected))
        whole = _PairIds(chosen[:boundary], chosen[boundary:], rejected[boundary:])
        fitted = _fit(whole, max_length=self._max_length, truncation=self._truncation)
        if isinstance(fitted, str):
            return DroppedRow(pair.row, pair.source, fitted, pair.where)
        return TokenizedPair(
            row=pair.row,
            source=pair.source,
            prompt_ids=fitted.prompt,
            chosen_ids=fitted.chosen,
            rejected_ids=fitted.rejected,
            chosen_truncated=len(fitted.chosen) < len(whole.chosen),
            rejected_truncated=len(fitted.rejected) < len(whole.rejected),
        )


class _PairIds(NamedTuple):
    prompt: IdArray
    chosen: IdArray
    rejected: IdArray


def _fit(ids: _PairIds, *, max_length: int, truncation: Truncation) -> _PairIds | DropReason:
    """The pair's ids within ``max_length``, or why there are none."""
    prompt, chosen, rejected = ids
    longest = max(len(chosen), len(rejected))
    if len(prompt) == 0:
        return "empty_prompt"
    if min(len(chosen), len(rejected)) == 0:
        return "empty_completion"
    if np.array_equal(chosen, rejected):
        return "identical_completions"
    match truncation:
        case "keep_start":
            room = max_length - len(prompt)
            if room < 1:
                return "prompt_fills_max_length"
            chosen, rejected = chosen[:room], rejected[:room]
            if np.array_equal(chosen, rejected):
                return "identical_after_truncation"
        case "keep_end":
            room = max_length - longest
            if room < 1:
                return "completion_fills_max_length"
            prompt = prompt[-room:]
        case "drop":
            if len(prompt) + longest > max_length:
                return "longer_than_max_length"
        case _:
            assert_never(truncation)
    return _PairIds(prompt, chosen, rejected)


def _encode(pair: PreferencePair, tokenizer: "PreTrainedTokenizerFast") -> list[IdArray]:
    """Ids of the prompt, of prompt + chosen and of prompt + rejected."""
    if isinstance(pair.prompt, str):
        texts = _plain_texts(pair, str(tokenizer.eos_token))
    else:
        texts = _rendered_texts(pair, tokenizer)
    encoded = tokenizer(
        texts,
        # A chat template writes the special tokens itself.
        add_special_tokens=isinstance(pair.prompt, str),
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # a length beyond the model's context is dealt with by truncation
    )
    return [np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]]


def _plain_texts(pair: PreferencePair, eos_text: str) -> list[str]:
    prompt, *completions = cast(tuple[str, str, str], (pair.prompt, pair.chosen, pair.rejected))
    ended = [text if text.endswith(eos_text) else text + eos_text for text in completions]
    return [prompt, *(prompt + text for text in ended)]


def _rendered_texts(pair: PreferencePair, tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    prompt, chosen, rejected = cast(
        tuple[list[Message], list[Message], list[Message]], (pair.prompt, pair.chosen, pair.rejected)
    )
    return _render([prompt, prompt + chosen, prompt + rejected], tokenizer, where=pair.where)


def _render(
    conversations: list[list[Message]], tokenizer: "PreTrainedTokenizerFast", *, where: str
) -> list[str]:
    """Conversations as text; the first is a prompt, and ends with the generation prompt."""
    from jinja2.exceptions import TemplateError

    template = chat_template(tokenizer)
    if template is None:
        raise ConfigError(
            "the data holds messages, but the tokenizer has no chat template",
            where=where,
            why="only the template the model was trained with turns messages into the text it knows",
            fix="save one with the tokenizer (chat_template.jinja), or use data whose rows are text",
        )
    render = functools.partial(tokenizer.apply_chat_template, chat_template=template, tokenize=False)
    prompt, *whole = conversations
    try:
        return [render(prompt, add_generation_prompt=True), *(render(messages) for messages in whole)]
    except TemplateError as error:
        raise DataError(
            f"the chat template refuses the messages ({str(error)[:_LONGEST_TEMPLATE_MESSAGE]})",
            where=where,
            why="the model was not trained on conversations of this shape",
            fix="correct the roles and their order, or remove the row",
        ) from error


def _common_prefix_length(a: IdArray, b: IdArray) -> int:
    shortest = min(len(a), len(b))
    differs = a[:shortest] != b[:shortest]
    return int(differs.argmax()) if differs.any() else shortest


def _refuse_foreign_ids(pair: PreferencePair, ids: IdArray, *, vocab_size: int) -> None:
    highest = int(ids.max(initial=0))
    if highest >= vocab_size:
        raise DataError(
            f"token id {highest} is outside the model's vocabulary of {vocab_size}",
            where=pair.where,
            why="the tokenizer is not the model's: the same ids would mean other text",
            fix="use the tokenizer that was saved with the model",
        )
