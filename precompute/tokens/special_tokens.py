"""Which texts a tokenizer takes for special tokens, wherever they are declared."""

import functools
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_opt.schemas.plain_data import json_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_HEAD = 3  # characters by which special tokens are looked for: there are thousands, which begin alike


def special_tokens(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> list[str]:
    """The texts that become one special token each, by their ids where tokenizer.json declares them.

    transformers' ``all_special_tokens`` has those that tokenizer_config.json names. Many tokenizers declare
    others, such as the borders of turns, in tokenizer.json alone.

    Args:
        tokenizer: As ``load_tokenizer`` returns it.
        folder: Where it was loaded from.
    """
    file = folder / "tokenizer.json"
    found = [
        *_stated(file, file.stat().st_mtime_ns),
        *(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special),
        *map(str, tokenizer.all_special_tokens),
    ]
    return [text for text in dict.fromkeys(found) if text]


# Parsed once for all that ask: a file of 10 MB takes a third of the time of loading the tokenizer.
@functools.lru_cache(maxsize=4)
def _stated(file: Path, changed: int) -> tuple[str, ...]:
    """Those that a tokenizer.json declares, by their ids; ``changed`` is when the file was."""
    added = json_of(file.read_text(encoding="utf-8")).get("added_tokens") or []
    return tuple(str(token["content"]) for token in added if token.get("special"))


class SpecialTexts:
    """Finds texts of special tokens in other texts.

    Args:
        tokens: The texts.
        end: One that may stand at a text's end.
    """

    def __init__(self, tokens: Collection[str], *, end: str) -> None:
        self._end = end
        self._tokens: dict[str, tuple[str, ...]] = {}
        for token in sorted(tokens):
            head = token[:_HEAD]
            self._tokens[head] = (*self._tokens.get(head, ()), token)

    def in_text(self, text: str) -> bool:
        """Whether a text spells one of them, other than the last at its very end."""
        found = self._heads.search(text)
        while found is not None:
            begin = found.start()
            last = text.startswith(self._end, begin) and begin + len(self._end) == len(text)
            heads = (text[begin : begin + size] for size in range(1, _HEAD + 1))
            if not last and any(text.startswith(self._tokens.get(head, ()), begin) for head in heads):
                return True
            found = self._heads.search(text, begin + 1)
        return False

    @functools.cached_property
    def _heads(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, sorted(self._tokens))) or r"(?!)")
