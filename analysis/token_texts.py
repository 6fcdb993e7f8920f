"""Decodes a pair's token ids to text that is safe to show in a report.

The text may come from a model or a stranger. Control characters are removed here, and the template escapes
markup.
"""

from collections.abc import Sequence
from typing import NamedTuple

import polars as pl

from dpo_opt.schemas.locations import AnyPath
from dpo_opt.schemas.manifest import TOKENIZER
from dpo_opt.schemas.safe_text import printable

_CHARACTERS = 900
# 900 characters never need more ids than this, but a prompt may have a hundred thousand.
_IDS = 2000


class PairText(NamedTuple):
    """One pair as text, each part cut to a length that fits on a page."""

    prompt: str
    chosen: str
    rejected: str


class TokenDecoder:
    """Decodes the ids of a shard folder; if the folder has no usable tokenizer, the ids are the text."""

    def __init__(self, shards_dir: AnyPath) -> None:
        self.problem: str | None = None
        """Why ids are shown instead of text, in one sentence."""
        self._tokenizer = None
        file = shards_dir / TOKENIZER / "tokenizer.json"
        if not file.is_file():
            self.problem = (
                f"Token ids are shown because there is no {TOKENIZER}/tokenizer.json in the shards."
            )
            return
        try:
            from tokenizers import Tokenizer
        except ImportError:
            self.problem = "Token ids are shown because the package tokenizers is not installed."
            return
        try:
            self._tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception:  # the only class that the Rust library raises
            self.problem = f"Token ids are shown because {TOKENIZER}/tokenizer.json is not readable."

    def text(self, ids: Sequence[int]) -> str:
        """The text of the ids, with special tokens and without control characters."""
        if self._tokenizer is None:
            return " ".join(map(str, ids))
        return printable(self._tokenizer.decode(list(ids), skip_special_tokens=False))


def pair_texts(shards: pl.LazyFrame, rows: Sequence[int], decoder: TokenDecoder) -> dict[int, PairText]:
    """The text of some pairs, by row: the end of the prompt and the start of both completions."""
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    found = (
        shards.filter(pl.col("row").is_in(list(rows)))
        .select(
            "row",
            "prompt_length",
            "chosen_length",
            "rejected_length",
            pl.col("prompt_ids").list.tail(_IDS),
            pl.col("chosen_ids").list.head(_IDS),
            pl.col("rejected_ids").list.head(_IDS),
        )
        .collect(engine="streaming")
    )
    texts = {}
    for row in found.iter_rows(named=True):
        prompt, chosen, rejected = (decoder.text(row[name]) for name in columns)
        texts[row["row"]] = PairText(
            prompt=_tail(prompt, more=row["prompt_length"] > _IDS),
            chosen=_head(chosen, more=row["chosen_length"] > _IDS),
            rejected=_head(rejected, more=row["rejected_length"] > _IDS),
        )
    return texts


def _head(text: str, *, more: bool) -> str:
    return f"{text[:_CHARACTERS]} […]" if more or len(text) > _CHARACTERS else text


def _tail(text: str, *, more: bool) -> str:
    return f"[…] {text[-_CHARACTERS:]}" if more or len(text) > _CHARACTERS else text
