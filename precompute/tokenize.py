"""Text to token ids: one policy, applied once, before the reference scores and the policy trains.

Scoring and training on ids that were cut or rendered differently is the most common silent error of
precomputed references; here ids are made in one place, and readers of the shards never tokenize.

The policy, version ``TEXT_TO_IDS``:

1. Text: the EOS token's text is appended to a completion that does not end with it. Prompt and
   prompt + completion are tokenized whole, by the tokenizer's own call, with the special tokens it adds.
   Messages: the chat template renders the prompt with the generation prompt, and prompt + completion
   without it, each with the row's ``tools`` and ``chat_template_kwargs``; what it renders is tokenized
   without further special tokens. A pair whose prompt is rendered differently when something follows it is
   refused.
2. The prompt's ids are those which the tokenized prompt and both tokenized sequences begin with in common;
   what follows them is completion. Text on both sides of the boundary may merge into one token, and a
   template may end the prompt for generation as no finished conversation does (an opened thought): such
   tokens count as completion.
3. ``truncation`` makes each sequence fit ``max_length``, or leaves the pair out.

Differences from TRL 1.16, which gives the same ids otherwise:

* ``keep_end`` takes the same tokens from the start of the prompt for both sides, as many as the longer side
  needs, and never touches a completion. TRL cuts each side by itself, so that chosen and rejected answer
  different prompts, and a long completion loses its own beginning.
* A pair without a signal is dropped and counted: equal completions, before or after truncation; a completion
  or a prompt without a token. TRL keeps those rows; their gradient is zero, or a first token has no log-prob.
* A template that renders the prompt's messages differently when a completion follows is refused. TRL takes
  what the ids have in common, and the policy is trained on parts of the prompt.
* ``drop`` does not exist in TRL.
"""

import copy
import functools
import inspect
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, assert_never, cast

import numpy as np

from dpo_opt.precompute.config import Truncation
from dpo_opt.schemas.errors import ConfigError, DataError
from dpo_opt.schemas.models import read_config
from dpo_opt.schemas.pairs import IdArray, Message, PreferencePair, Text, TokenizedPair
from dpo_opt.schemas.shards import DroppedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXT_TO_IDS = "1"
"""Changes whenever the same text could become other ids, or another pair could be dropped."""

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


def model_vocab_size(folder: Path) -> int:
    """How many ids the model knows.

    Raises:
        ConfigError: Its config.json does not say.
    """
    config = read_config(folder)
    try:
        return int(config.get("text_config", config)["vocab_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            "config.json does not say how large the vocabulary is (vocab_size)",
            where=str(folder),
            why="ids beyond it would be scored as something else",
            fix="save the model again with save_pretrained",
        ) from error


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
        self._backend = _whole_text_backend(tokenizer)
        self._max_length = max_length
        self._truncation: Truncation = truncation
        self._vocab_size = vocab_size

    def __call__(self, pair: PreferencePair) -> TokenizedPair | DroppedRow:
        """A pair's ids, or why it is left out.

        Raises:
            ConfigError: The pair holds messages and the tokenizer has no chat template.
            DataError: The chat template refuses the messages, or an id is outside the vocabulary.
        """
        (found,) = self.encode([pair])
        if isinstance(found, DataError):
            raise found
        return self.fit(pair, found)

    def encode(self, pairs: Sequence[PreferencePair]) -> list["PairIds | DataError"]:
        """The whole ids of many pairs, which is quicker than one by one; an unusable pair is its error.

        Raises:
            ConfigError: A pair holds messages and the tokenizer has no chat template.
        """
        texts: list[tuple[str, str, str] | DataError] = [self._texts(pair) for pair in pairs]
        ids: dict[int, PairIds] = {}
        # A chat template writes the special tokens itself.
        for plain in (True, False):
            chosen = [
                i
                for i, (pair, text) in enumerate(zip(pairs, texts, strict=True))
                if isinstance(pair.prompt, str) == plain and not isinstance(text, DataError)
            ]
            flat = [text for i in chosen for text in cast(tuple[str, str, str], texts[i])]
            encoded = self._backend.encode_batch_fast(flat, add_special_tokens=plain)
            for n, i in enumerate(chosen):
                ids[i] = _split(*(np.array(e.ids, dtype=np.int32) for e in encoded[3 * n : 3 * n + 3]))
        return [
            text if isinstance(text, DataError) else self._checked(pair, ids[i])
            for i, (pair, text) in enumerate(zip(pairs, texts, strict=True))
        ]

    def fit(self, pair: PreferencePair, whole: "PairIds") -> TokenizedPair | DroppedRow:
        """A pair's whole ids within ``max_length``, or why it is left out."""
        fitted = fit_ids(whole, max_length=self._max_length, truncation=self._truncation)
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

    def _texts(self, pair: PreferencePair) -> tuple[str, str, str] | DataError:
        if isinstance(pair.prompt, str):
            return _plain_texts(pair, str(self.tokenizer.eos_token))
        try:
            return _rendered_texts(pair, self.tokenizer)
        except DataError as error:
            return error

    def _checked(self, pair: PreferencePair, ids: "PairIds") -> "PairIds | DataError":
        highest = max(int(part.max(initial=0)) for part in (ids.prompt, ids.chosen, ids.rejected))
        if highest < self._vocab_size:
            return ids
        return DataError(
            f"token id {highest} is outside the model's vocabulary of {self._vocab_size}",
            where=pair.where,
            why="the tokenizer is not the model's: the same ids would mean other text",
            fix="use the tokenizer that was saved with the model",
            kind="vocabulary",
        )


def _whole_text_backend(tokenizer: "PreTrainedTokenizerFast") -> Any:
    """The tokenizer's own engine, on its own: it cuts and pads nothing, and returns ids without offsets."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    return backend


class PairIds(NamedTuple):
    """A pair's token ids before truncation, divided where the prompt ends."""

    prompt: IdArray
    chosen: IdArray
    rejected: IdArray
    merged: bool = False
    """The prompt's last tokens merged with what follows, and count as completion."""

    @property
    def shared(self) -> int:
        """How many tokens both completions begin with."""
        return _common_prefix_length(self.chosen, self.rejected)


def _split(prompt: IdArray, chosen: IdArray, rejected: IdArray) -> PairIds:
    boundary = min(_common_prefix_length(prompt, chosen), _common_prefix_length(prompt, rejected))
    return PairIds(chosen[:boundary], chosen[boundary:], rejected[boundary:], merged=boundary < len(prompt))


def fit_ids(ids: PairIds, *, max_length: int, truncation: Truncation) -> PairIds | DropReason:
    """The pair's ids within ``max_length``, or why there are none."""
    prompt, chosen, rejected, merged = ids
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
    return PairIds(prompt, chosen, rejected, merged)


def _plain_texts(pair: PreferencePair, eos_text: str) -> tuple[str, str, str]:
    prompt, chosen, rejected = cast(tuple[str, str, str], (pair.prompt, pair.chosen, pair.rejected))
    return prompt, prompt + _ended(chosen, eos_text), prompt + _ended(rejected, eos_text)


def _ended(text: str, eos_text: str) -> str:
    return text if text.endswith(eos_text) else text + eos_text


def _rendered_texts(pair: PreferencePair, tokenizer: "PreTrainedTokenizerFast") -> tuple[str, str, str]:
    prompt, chosen, rejected = cast(
        tuple[list[Message], list[Message], list[Message]], (pair.prompt, pair.chosen, pair.rejected)
    )
    conversations = [prompt, prompt + chosen, prompt + rejected]
    settings = {"tools": pair.tools, **_template_settings(pair, tokenizer)}
    opened, *wholes = _render(conversations, tokenizer, where=pair.where, **settings)
    for side, whole in zip(("chosen", "rejected"), wholes, strict=True):
        if not whole.startswith(opened):
            # The prompt's end may be written for generation only; its messages may not change.
            _, alone = _render([prompt, prompt], tokenizer, where=pair.where, **settings)
            if not whole.startswith(alone):
                raise _other_prompt(alone, whole, side, pair.where)
    return opened, wholes[0], wholes[1]


def _template_settings(pair: PreferencePair, tokenizer: "PreTrainedTokenizerFast") -> dict[str, object]:
    """The row's settings of the template; those of the call that renders it are not a row's to set."""
    settings = pair.chat_template_kwargs or {}
    if settings:
        arguments = inspect.signature(tokenizer.apply_chat_template).parameters.keys() - {"documents"}
        taken = next((name for name in settings if name in arguments), None)
        if taken is not None:
            raise DataError(
                f'"chat_template_kwargs" sets {taken}, which is no setting of a template',
                where=pair.where,
                why="it would change what is rendered or tokenized for this row alone",
                fix="remove it from the row",
                kind="tools",
            )
    return settings


def _render(
    conversations: list[list[Message]], tokenizer: "PreTrainedTokenizerFast", *, where: str, **settings: Any
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
    try:
        render = functools.partial(
            tokenizer.apply_chat_template, **{"chat_template": template, "tokenize": False, **settings}
        )
        prompt, *whole = conversations
        return [render(prompt, add_generation_prompt=True), *(render(messages) for messages in whole)]
    # A template is a program of its own: it may add text to a list, or ask for what a message does not have.
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise DataError(
            f"the chat template refuses the messages ({str(error)[:_LONGEST_TEMPLATE_MESSAGE]})",
            where=where,
            why="the model was not trained on conversations of this shape",
            fix="correct the roles and their order, or remove the row",
            kind="template",
        ) from error


def _other_prompt(prompt: str, whole: str, side: str, where: str) -> DataError:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False))
    differs = sum(1 for _ in same)
    alone, followed = (repr(text[max(0, differs - 20) : differs + 30]) for text in (prompt, whole))
    return DataError(
        f"the chat template renders the prompt differently when {side} follows: "
        f"from character {differs + 1} on it is {followed}, alone {alone}",
        where=where,
        why="part of the prompt would be scored and trained on as if the model had said it",
        fix="use a template that renders prompt + completion as the prompt's own text and more; "
        "`dpo-opt preview` shows what is rendered",
        kind="template_mismatch",
    )


def _common_prefix_length(a: IdArray, b: IdArray) -> int:
    shortest = min(len(a), len(b))
    differs = a[:shortest] != b[:shortest]
    return int(differs.argmax()) if differs.any() else shortest
