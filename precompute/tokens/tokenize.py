"""Text to token ids: one policy, applied once, before the reference scores and the policy trains.

Scoring and training on ids that were cut or rendered differently is the most common silent error of
precomputed references; here ids are made in one place, and readers of the shards never tokenize.

The policy, version ``TEXT_TO_IDS``:

1. Text: the EOS token's text is appended to a completion that does not end with it. Prompt and
   prompt + completion are tokenized whole, by the tokenizer's own call, with the special tokens it adds.
   Messages: the chat template renders the prompt with the generation prompt, and prompt + completion
   without it, each with the row's ``tools`` and ``chat_template_kwargs``; what it renders is tokenized
   without further special tokens. A pair whose prompt is rendered differently when something follows it is
   refused. A template that asks for the time is told one date for all rows (``template_date``), at midnight.
2. The prompt's ids are those which the tokenized prompt and both tokenized sequences begin with in common;
   what follows is completion. Text on both sides of the boundary may merge into one token, and a template may
   end the prompt for generation as no finished conversation does: such tokens count as completion.
3. In a completion of several messages the tokens of the assistant's turns count that are trained on
   (``turns``). What follows the last of them is left out: nothing depends on it.
4. ``truncation`` makes each sequence fit ``max_length``, or leaves the pair out.

Differences from TRL 1.16, which gives the same ids otherwise:

* ``keep_end`` takes the same tokens from the start of the prompt for both sides, as many as the longer side
  needs, and never touches a completion. TRL cuts each side by itself, so that chosen and rejected answer
  different prompts, and a long completion loses its own beginning.
* A pair without a signal is dropped and counted: equal completions, before or after truncation; a completion
  or a prompt without a token. TRL keeps those rows; their gradient is zero, or a first token has no log-prob.
* A template that renders the prompt's messages differently when a completion follows is refused. TRL takes
  what the ids have in common, and the policy is trained on parts of the prompt.
* ``drop`` does not exist in TRL. It scores every token of a completion, whoever speaks.
"""

import copy
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from dpo_opt.precompute.config import TrainOn, Truncation
from dpo_opt.precompute.read.strict_json import SKIP_ROW
from dpo_opt.precompute.tokens.ends import Added, added_tokens
from dpo_opt.precompute.tokens.faithful import Part, forgets
from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer, model_vocab_size
from dpo_opt.precompute.tokens.long_texts import LONGEST_PIECE, long_text_ids
from dpo_opt.precompute.tokens.templates import asks_for_the_date, today
from dpo_opt.precompute.tokens.texts import PairTexts, plain_texts, rendered_prompt, texts_of_messages
from dpo_opt.precompute.tokens.truncation import PairIds, fit_ids, split_ids
from dpo_opt.precompute.tokens.turns import counting_tokens
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import IdArray, PreferencePair, Text, TokenizedPair
from dpo_opt.schemas.shards import DroppedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXT_TO_IDS = "2"
"""Changes whenever the same text could become other ids, or another pair could be dropped."""

# The engine needs 100 to 300 bytes for a character that takes at most 4 here. These texts are enough for its
# threads; a text that is longer by itself is encoded in windows.
_CHARACTERS_AT_ONCE = 2**20


def prompt_ids(
    prompt: Text,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    where: str,
    date: str | None = None,
    tools: list[object] | None = None,
    row_settings: dict[str, object] | None = None,
) -> IdArray:
    """Ids of a prompt alone, as a completion is sampled from it; the rest is as for a pair.

    Raises:
        ConfigError: The prompt holds messages and the tokenizer has no chat template.
        DataError: The chat template refuses the messages, or leaves something out.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
        # What the tokenizer adds behind a text ends it; a completion goes on from before that.
        behind = len(added_tokens(tokenizer.backend_tokenizer, str(tokenizer.eos_token)).behind)
        return np.array(ids[: len(ids) - behind], dtype=np.int32)
    pair = PreferencePair(0, prompt, [], [], None, where, tools=tools, chat_template_kwargs=row_settings)
    text = rendered_prompt(pair, tokenizer, date=date)
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)


class PairTokenizer:
    """Turns pairs into ids by one policy.

    Args:
        tokenizer: The reference's tokenizer.
        max_length: Most tokens of prompt plus completion.
        truncation: What is done with a longer sequence.
        vocab_size: Number of ids the model knows.
        template_date: Date that a chat template is told which asks for the time; default today.
        train_on: Which of the assistant's turns in a completion count.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        max_length: int,
        truncation: Truncation,
        vocab_size: int,
        template_date: str | None = None,
        train_on: TrainOn = "all",
    ) -> None:
        self.tokenizer = tokenizer
        self._backend = _whole_text_backend(tokenizer)
        self._max_length = max_length
        self._truncation: Truncation = truncation
        self._vocab_size = vocab_size
        self._train_on: TrainOn = train_on
        self.template_date = (template_date or today()) if asks_for_the_date(tokenizer) else None
        """Date that the chat template is told; None where it does not ask for the time."""

    def on(self, template_date: str | None) -> "PairTokenizer":
        """This tokenizer, with another date for the chat template; None keeps its own date."""
        if template_date in (None, self.template_date):
            return self
        return PairTokenizer(
            self.tokenizer,
            max_length=self._max_length,
            truncation=self._truncation,
            vocab_size=self._vocab_size,
            template_date=template_date,
            train_on=self._train_on,
        )

    def knows_every_id(self) -> bool:
        """Whether every id that a text can give is in the model's vocabulary."""
        added = self._backend.encode("", add_special_tokens=True).ids
        ids = [*self._backend.get_vocab(with_added_tokens=True).values(), *added]
        return max(ids, default=0) < self._vocab_size

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

    def encode(self, pairs: Sequence[PreferencePair]) -> list[PairIds | DataError]:
        """The whole ids of many pairs, which is quicker than one by one; an unusable pair is its error.

        Raises:
            ConfigError: A pair holds messages and the tokenizer has no chat template.
        """
        texts: list[PairTexts | DataError] = [self.texts(pair) for pair in pairs]
        ids: dict[int, PairIds | DataError] = {}
        # A chat template writes the special tokens itself.
        for plain in (True, False):
            chosen = [
                i
                for i, (pair, text) in enumerate(zip(pairs, texts, strict=True))
                if isinstance(pair.prompt, str) == plain and not isinstance(text, DataError)
            ]
            shown = [(i, cast(PairTexts, texts[i])) for i in chosen]
            flat = [text for _, of_pair in shown for text in of_pair[:3]]
            encoded = self._ids(flat, special=plain)
            for i, of_pair in shown:
                ids[i] = self._split(pairs[i], of_pair, [next(encoded) for _ in range(3)])
        return [text if isinstance(text, DataError) else ids[i] for i, text in enumerate(texts)]

    def texts(self, pair: PreferencePair) -> PairTexts | DataError:
        """What is tokenized of a pair: the prompt, and with either completion; or why it is unusable.

        Raises:
            ConfigError: The pair holds messages and the tokenizer has no chat template.
        """
        if isinstance(pair.prompt, str):
            return plain_texts(pair, self.tokenizer.eos_token or "")
        try:
            return texts_of_messages(pair, self.tokenizer, date=self.template_date, train_on=self._train_on)
        except DataError as error:
            return error

    def fit(self, pair: PreferencePair, whole: PairIds) -> TokenizedPair | DroppedRow:
        """A pair's whole ids within ``max_length``, or why it is left out."""
        unpaired = pair.label is not None
        fitted = fit_ids(whole, max_length=self._max_length, truncation=self._truncation, unpaired=unpaired)
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
            id=pair.id,
            chosen_mask=fitted.chosen_mask,
            rejected_mask=fitted.rejected_mask,
            label=pair.label,
        )

    def _ids(self, texts: Sequence[str], *, special: bool) -> Iterator[IdArray | None]:
        """The ids of each text; only a piece of the texts is ever in the engine's own, far larger, form.

        None is a text that is long and has no place where it could be divided.
        """
        piece: list[str] = []
        characters = 0
        for text in texts:
            if piece and characters + len(text) > _CHARACTERS_AT_ONCE:
                yield from self._ids_of_piece(piece, special=special)
                piece, characters = [], 0
            if len(text) > _CHARACTERS_AT_ONCE:
                yield self._long_ids(text, special=special)
                continue
            piece.append(text)
            characters += len(text)
        yield from self._ids_of_piece(piece, special=special)

    def _ids_of_piece(self, texts: list[str], *, special: bool) -> list[IdArray]:
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=special)
        return [np.array(e.ids, dtype=np.int32) for e in encoded]

    def _long_ids(self, text: str, *, special: bool) -> IdArray | None:
        ids = long_text_ids(text, self._engine_with_offsets)
        if ids is None:
            return None
        if not special:
            return ids
        joined: IdArray = np.concatenate([self.added.before, ids, self.added.behind]).astype(np.int32)
        return joined

    @functools.cached_property
    def added(self) -> Added:
        """What the tokenizer adds by itself to a text."""
        return added_tokens(self._backend, self.tokenizer.eos_token or "a")

    @functools.cached_property
    def _engine_with_offsets(self) -> Any:
        engine = _whole_text_backend(self.tokenizer)
        engine.post_processor = None
        return engine

    def _split(
        self, pair: PreferencePair, texts: PairTexts, encoded: Sequence[IdArray | None]
    ) -> PairIds | DataError:
        prompt, chosen, rejected = encoded
        if prompt is None or chosen is None or rejected is None:
            return DataError(
                f"more than {LONGEST_PIECE:,} characters without a space or another sign between two letters",
                where=pair.where,
                why="such a text can only be tokenized as a whole, which takes about 300 bytes a character",
                fix=SKIP_ROW,
                kind="indivisible_text",
            )
        try:
            masks = [
                spans
                if spans is None
                else counting_tokens(text, found, spans, self._engine_with_offsets, pair.where)
                for text, found, spans in zip(texts[1:3], (chosen, rejected), texts[3:], strict=True)
            ]
        except DataError as error:
            return error
        behind = len(self.added.behind) if isinstance(pair.prompt, str) else 0
        ids = split_ids(prompt, chosen, rejected, *masks, behind=behind)
        highest = max(int(part.max(initial=0)) for part in ids[:3])
        if highest < self._vocab_size:
            if isinstance(pair.prompt, str):
                return ids
            return ids._replace(forgets=forgets(Part("prompt", pair.prompt, texts.prompt)))
        return DataError(
            f"token id {highest} is outside the model's vocabulary of {self._vocab_size}",
            where=pair.where,
            why="the tokenizer is not the model's: the same ids would mean other text",
            fix=f"{SKIP_ROW}; or use the tokenizer that was saved with the model",
            kind="vocabulary",
        )


@functools.cache
def encoder(
    folder: Path, template_date: str | None = None, train_on: TrainOn = "all", *, needs_eos: bool = True
) -> PairTokenizer:
    """A model's tokenizer for whole ids; what is done with a length is not asked.

    Raises:
        ConfigError: As ``load_tokenizer`` and ``model_vocab_size``.
    """
    return PairTokenizer(
        _loaded(folder, needs_eos=needs_eos),
        max_length=1,
        truncation="drop",
        vocab_size=model_vocab_size(folder),
        template_date=template_date,
        train_on=train_on,
    )


# Loaded once in a process: it takes a second, and encoders of a folder differ in date and turns.
_loaded = functools.cache(load_tokenizer)


def _whole_text_backend(tokenizer: "PreTrainedTokenizerFast") -> Any:
    """The tokenizer's own engine, on its own: it cuts and pads nothing, and returns ids without offsets."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    return backend
