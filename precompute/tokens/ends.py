"""Whether a completion ends with exactly one token that stops generation, and a prompt with none.

A policy that is trained on completions without such a token does not learn to stop. Behind the first one
it would be trained on what it never gets to write. Behind a prompt that ends with one nothing is to be said.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dpo_opt.precompute.tokens.special_tokens import special_tokens
from dpo_opt.precompute.tokens.truncation import PairIds
from dpo_opt.schemas.models import read_config, text_config
from dpo_opt.schemas.pairs import IdArray
from dpo_opt.schemas.plain_data import json_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OddEnd = Literal["no_end", "unknown_end", "several_ends", "added_end", "prompt_end"]
"""What may be odd about a pair's ends; ``dpo-opt check`` says what each means."""


class Added(NamedTuple):
    """The tokens that a tokenizer adds by itself to any text."""

    before: list[int]
    behind: list[int]


def added_tokens(backend: Any, text: str) -> Added:
    """What the tokenizers library adds around a text, and so around any other.

    Args:
        backend: A ``tokenizers.Tokenizer`` that pads nothing.
        text: Not empty.
    """
    around = backend.encode(text, add_special_tokens=True)
    first = around.special_tokens_mask.index(0)
    last = len(around) - around.special_tokens_mask[::-1].index(0)
    return Added(around.ids[:first], around.ids[last:])


def stop_ids(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> frozenset[int]:
    """The tokens at which engines stop: the tokenizer's EOS and those of generation_config.json.

    Where that file is not there or no JSON, transformers and vLLM take ``eos_token_id`` of config.json.
    """
    try:
        settings = json_of((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = None
    if not isinstance(settings, dict):
        config = read_config(folder)
        settings = {**config, **text_config(config)}
    stated = settings.get("eos_token_id")
    ids = stated if isinstance(stated, list) else [stated]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if type(i) is int)


class Ends:
    """Judges the ends of pairs.

    Args:
        tokenizer: As ``load_tokenizer`` returns it.
        folder: Where it was loaded from.
        added: What it adds by itself to a text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", folder: Path, *, added: Added) -> None:
        self._tokenizer = tokenizer
        self._stops = stop_ids(tokenizer, folder)
        self._adds_stop = not self._stops.isdisjoint(added.behind)
        self._special = set(tokenizer.convert_tokens_to_ids(special_tokens(tokenizer, folder)))
        self._is_blank: dict[int, bool] = {}

    def odd(self, ids: PairIds, *, plain: bool) -> set[OddEnd]:
        """What is odd about a pair's ends, before it is cut.

        White space behind a token that stops generation is ordinary: many templates end every turn with a
        line break.

        Args:
            ids: Of the pair.
            plain: It is of text, around which the tokenizer adds tokens of its own.
        """
        found: set[OddEnd] = set()
        for side in (ids.chosen, ids.rejected):
            stops, last = self._end_of(side)
            if stops > 1:
                found.add("added_end" if plain and self._adds_stop else "several_ends")
            elif stops == 0 and last is not None:
                found.add("unknown_end" if last in self._special else "no_end")
        if self._end_of(ids.prompt)[0]:
            found.add("prompt_end")
        return found

    def _end_of(self, ids: IdArray) -> tuple[int, int | None]:
        """How many stop tokens stand at the end, and what stands before them; white space does not count."""
        stops = 0
        for token in map(int, ids[::-1]):
            if token in self._stops:
                stops += 1
            elif not self._blank(token):
                return stops, token
        return stops, None

    def _blank(self, token: int) -> bool:
        if token not in self._is_blank:
            self._is_blank[token] = not str(self._tokenizer.decode([token])).strip()
        return self._is_blank[token]
