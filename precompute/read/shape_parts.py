"""What every published form of row has: its keys, how it becomes pairs, and how it is refused."""

import json
from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn

from dpo_opt.precompute.read.strict_json import FIX_ROW, escape, kind_of
from dpo_opt.schemas.errors import DataError

Values = dict[str, object]

PROMPT_KEYS = ("prompt", "instruction", "question", "context", "input", "query")
"""Keys that publishers use for the prompt. In a row with ``chosen`` only ``prompt`` is one."""

PAIR_KEYS = frozenset({"chosen", "rejected"})
LABEL_KEYS = ("label", "kto_tag")
"""Keys by which a row of one completion says whether it is desirable."""
MEDIA = (
    *("image", "images", "image_path", "img_path", "image_url", "rejected_images"),
    *("image_urls", "image_file", "img", "picture", "pixel_values", "media"),
    *("video", "videos", "video_path", "rejected_videos"),
    *("audio", "audios", "audio_path", "rejected_audios"),
)
SYSTEM_KEYS = ("system", "system_prompt", "system_message")
BACKGROUND_KEYS = ("document", "documents", "knowledge")
"""Keys of what a question is about."""
CONVERSATION_KEYS = ("conversations", "messages")
"""Keys of a conversation beside a pair."""
TOOL_KEYS = ("functions", "chosen_tools")
"""Where OpenAI's first form of calls, and pairs with tools for each side, have the tools."""
HISTORY_KEYS = ("history", "chat_history", "conversation_history")
"""Keys of earlier turns."""

ADDED_COLUMNS = frozenset(
    {*("image", "images", "video", "videos", "audio", "audios"), *("system", "system_prompt")}
)
"""Columns of tables that early versions loaded for some forms only."""

LATE_COLUMNS = frozenset({*MEDIA, *SYSTEM_KEYS, *BACKGROUND_KEYS, *TOOL_KEYS, *HISTORY_KEYS}) - {
    *ADDED_COLUMNS,
    "history",  # which is SHP's prompt
}
"""Columns of tables that early versions never loaded."""

AROUND_KEYS = ADDED_COLUMNS | LATE_COLUMNS | {*PROMPT_KEYS, *CONVERSATION_KEYS, "history"} - {"prompt"}
"""Keys beside a pair that may belong to its prompt."""

CARRIED_KEYS = ("source", "id", "weight", "margin", "tools", "chat_template_kwargs")
"""What a row may have in addition to prompt and completions."""

RATINGS = {
    "score_chosen": "score_rejected",
    "chosen_score": "rejected_score",
    "chosen-rating": "rejected-rating",
    "chosen_rating": "rejected_rating",
}
"""Keys under which publishers rate the chosen completion, each with that of the rejected one.

Of the first pair the margin is made; the others are compared by ``check`` alone."""


_KEPT = (*CARRIED_KEYS, *RATINGS, *RATINGS.values())


class Shape(NamedTuple):
    """A recognised form of row."""

    name: str
    keys: frozenset[str]
    """A row of this form has all of them."""
    convert: Callable[[Values, str], list[Values]]
    ranked: bool = False
    """One row may be any number of pairs."""
    absent: frozenset[str] = frozenset()
    """A row of this form has none of them: with them it is another form."""
    objects: frozenset[str] = frozenset()
    """Those of ``keys`` whose values are objects; other forms have text or lists there."""
    filled: frozenset[str] = frozenset()
    """Those of ``keys`` that are not empty; a row in which they are is of another form."""
    also: frozenset[str] = frozenset()
    """Further keys that the form reads where a row has them."""
    unpaired: bool = False
    """Its rows have one completion, which is written as both, and a ``label``."""

    def is_form_of(self, values: Values) -> bool:
        """Whether a row is of this form."""
        if not (self.keys <= values.keys() and self.absent.isdisjoint(values)):
            return False
        if any(is_empty(values[key]) for key in self.filled):
            return False
        return all(isinstance(values[key], dict) for key in self.objects)


def kept(values: Values) -> Values:
    """Those values of a row of one pair that are carried along with its texts."""
    return {key: values[key] for key in _KEPT if key in values}


def is_empty(value: object) -> bool:
    """Whether a column says nothing: null, or no text, list or object but such as hold nothing."""
    if isinstance(value, dict):
        return all(map(is_empty, value.values()))
    return all(map(is_empty, value)) if isinstance(value, list) else value is None or value == ""


def agreed(named: Mapping[str, object], where: str) -> object:
    """What several keys of a row say, each of which alone would be read; None where all are empty.

    Args:
        named: Key to value. The first that is not empty counts.
        where: Names the row in messages.

    Raises:
        DataError: Two of them say different things.
    """
    given = [key for key, value in named.items() if not is_empty(value)]
    for other in given[1:]:
        if named[other] != named[given[0]]:
            refuse_two(given[0], other, where)
    return named[given[0]] if given else None


def refuse_two(first: str, second: str, where: str, *, inside: str | None = None) -> NoReturn:
    """Refuse a row in which two keys say one part of the pair, each in its way.

    Args:
        first: One key.
        second: The other.
        where: Names the row in messages.
        inside: The part of the row that has them; None: the row itself.
    """
    raise DataError(
        f'"{escape(first)}" and "{escape(second)}" say different things',
        where=where,
        why="each of them alone would be read, and which is meant cannot be known",
        fix=f"remove one of them from {inside}"
        if inside
        else f"remove one of them from the row, or pass --ignore-column {second} to read the other",
        kind="two_sources",
    )


def prompt_of(values: Values, where: str) -> object:
    """The prompt, under whichever key it stands.

    Raises:
        DataError: There is none.
    """
    for key in PROMPT_KEYS:
        if key in values:
            return values[key]
    refuse('there is no "prompt"', where)


def said(role: str, content: object) -> Values:
    """A message."""
    return {"role": role, "content": content}


def refuse_label(key: str, label: object, where: str, *, expected: str) -> NoReturn:
    """Refuse a label that names no side."""
    if isinstance(label, str):
        found = f'"{escape(label)}"'
    else:
        found = escape(json.dumps(label)) if isinstance(label, int | float) else kind_of(label)
    raise DataError(
        f'"{key}" is {found}, not {expected}',
        where=where,
        why="nothing else says which completion is preferred",
        fix=FIX_ROW,
        kind="label",
    )


def refuse_tie(where: str) -> NoReturn:
    """Refuse a row that prefers nothing."""
    raise DataError(
        "no completion is preferred over another",
        where=where,
        why="DPO learns from preferences; a tie has none",
        fix="remove the row, or pass --on-bad-row skip",
        kind="tie",
    )


def refuse(what: str, where: str) -> NoReturn:
    """Refuse a row that its form does not allow."""
    raise DataError(what, where=where, why="the pair cannot be made of this row", fix=FIX_ROW, kind="shape")
