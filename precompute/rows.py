"""One source row, checked: raw values become a preference pair, or an error that names the row.

Common loaders fill a missing key with null, accept a file that is text in one row and messages in the
next, and decode what is not UTF-8; each of these reaches the loss as an ordinary number. Here every row is
what it says, or it is refused with its line.

A row without ``prompt`` holds the prompt inside both completions. It is found by one of three rules:

* Human/Assistant transcripts (both begin with ``\\n\\nHuman:`` and contain ``\\n\\nAssistant:``): everything
  up to and including the last ``\\n\\nAssistant:`` before the transcripts differ.
* Other text: the longest common prefix in characters, less a space at its end, so that the completions
  begin with that space; where one side is the beginning of the other, all but its last character. This is
  TRL's rule, which also splits transcripts and so gives words that two answers happen to share to the prompt.
* Messages: the longest common prefix in messages, always leaving at least one to either side (TRL's rule).
"""

import json
from collections import Counter
from typing import NamedTuple, NoReturn, cast

from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import Message, PreferencePair, Text

COLUMNS = ("prompt", "chosen", "rejected", "source")
"""The keys that are read; any other key of a row is ignored."""

_HUMAN = "\n\nHuman:"
_ASSISTANT = "\n\nAssistant:"
_MESSAGE_KEYS = ("role", "content")
_LONGEST_QUOTE = 60  # a message may quote a key of the user's file, never a whole text
_FIX_ROW = "correct or remove the row; `dpo-opt check` lists every such row at once"


class Form(NamedTuple):
    """What kind of row it is; all rows of a file are of one form."""

    messages: bool
    prompt_given: bool

    def __str__(self) -> str:
        return f'{"messages" if self.messages else "text"} with{"" if self.prompt_given else "out"} "prompt"'


class _RefusedJson(ValueError):
    """Something json would accept and no other reader should see."""


def parse_object(line: bytes, *, where: str) -> dict[str, object]:
    """The JSON object on one line.

    Raises:
        DataError: Not UTF-8, not JSON, no object, nested too deeply, a key twice in an object, or NaN.
    """
    try:
        text = line.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise DataError(
            f"not valid UTF-8 at byte {error.start + 1} of the line",
            where=where,
            why="guessing another encoding would change the text",
            fix="save the file as UTF-8, for example with `iconv -f WINDOWS-1252 -t UTF-8 FILE`",
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"not valid JSON at column {error.colno} ({error.msg})",
            where=where,
            why="each line is one JSON object",
            fix=_FIX_ROW,
        ) from error
    except _RefusedJson as error:
        raise DataError(str(error), where=where, why="JSON does not define it", fix=_FIX_ROW) from error
    except ValueError as error:  # an integer of thousands of digits
        raise DataError(f"not readable as JSON ({quote(str(error))})", where=where, fix=_FIX_ROW) from error
    except RecursionError as error:
        raise DataError(
            "the JSON value is nested too deeply",
            where=where,
            why="no preference pair looks like that",
            fix=_FIX_ROW,
        ) from error
    if not isinstance(value, dict):
        raise DataError(
            f"{_kind_of(value)} where a JSON object is expected",
            where=where,
            why='each line is one pair: {"prompt": ..., "chosen": ..., "rejected": ...}',
            fix=_FIX_ROW,
        )
    return value


def to_pair(values: dict[str, object], *, row: int, where: str) -> tuple[PreferencePair, Form]:
    """Check a row's values and find its prompt.

    Args:
        values: Key to value, as JSON or Parquet gives it.
        row: Index of the row in its file.
        where: Names the row in messages.

    Raises:
        DataError: A key is missing, a value is of the wrong kind or empty, or there is no common prompt.
    """
    for key in ("chosen", "rejected"):
        if key not in values:
            found = quote(", ".join(map(_escape, values))) or "none"
            raise DataError(
                f'the key "{key}" is missing (found: {found})',
                where=where,
                why='a pair needs both completions, under the keys "chosen" and "rejected"',
                fix=_FIX_ROW,
            )
    texts: dict[str, Text] = {
        key: _text(values[key], key, where) for key in ("prompt", "chosen", "rejected") if key in values
    }
    _refuse_mixture(texts, where)
    form = Form(messages=isinstance(texts["chosen"], list), prompt_given="prompt" in texts)
    chosen, rejected = texts["chosen"], texts["rejected"]
    _refuse_empty(chosen, "chosen", where)
    _refuse_empty(rejected, "rejected", where)
    if form.prompt_given:
        prompt = texts["prompt"]
        if prompt == []:
            _refuse("prompt", "is an empty list", where, why="a conversation has at least one message")
    else:
        prompt, chosen, rejected = _split_prompt(chosen, rejected, where)
        _refuse_empty(chosen, "chosen", where, after="after the prompt that both sides share")
        _refuse_empty(rejected, "rejected", where, after="after the prompt that both sides share")
    source = _source(values.get("source"), where)
    return PreferencePair(row, prompt, chosen, rejected, source, where), form


def quote(text: str) -> str:
    """The beginning of a text, short enough for a message."""
    return text if len(text) <= _LONGEST_QUOTE else text[: _LONGEST_QUOTE - 3] + "..."


def _unique(members: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(members)
    if len(values) < len(members):
        ((key, _),) = Counter(key for key, _ in members).most_common(1)
        raise _RefusedJson(f'the key "{quote(_escape(key))}" appears twice in one object')
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise _RefusedJson(f"{name} is not a JSON value")


def _escape(key: str) -> str:
    """A key as it can be printed: control characters and lone surrogates escaped."""
    return json.dumps(key)[1:-1]


def to_prompt(values: dict[str, object], *, where: str) -> Text:
    """A row's prompt alone; its other keys are ignored.

    Raises:
        DataError: There is no prompt, or it is empty or of the wrong kind.
    """
    prompt = _text(values.get("prompt"), "prompt", where)
    if not prompt:
        _refuse("prompt", "is empty", where, why="there is nothing to complete")
    return prompt


def _kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    kinds = {bool: "a boolean", str: "a string", list: "a list", dict: "an object", int: "a number"}
    return "null" if value is None else kinds.get(type(value), "a number")


def _text(value: object, key: str, where: str) -> Text:
    if isinstance(value, str):
        _refuse_surrogates(value, key, where)
        return value
    if isinstance(value, list):
        return [_message(m, f'message {i} of "{key}"', where) for i, m in enumerate(value, start=1)]
    _refuse(key, f"is {_kind_of(value)}", where, why="it must be text or a list of messages")


def _message(value: object, name: str, where: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(
            f"{name} is {_kind_of(value)}",
            where=where,
            why='a message is an object with "role" and "content"',
            fix=_FIX_ROW,
        )
    # A table holds every key in every message; one that is null there was not in the message.
    others = [key for key, member in value.items() if key not in _MESSAGE_KEYS and member is not None]
    if others:
        raise DataError(
            f'{name} has the key "{quote(_escape(str(others[0])))}", which is not supported yet',
            where=where,
            why="ignoring it would train on another conversation than the one in the data",
            fix='keep only "role" and "content", or render the conversation to text',
        )
    for key in _MESSAGE_KEYS:
        if key not in value:
            raise DataError(
                f'{name} lacks "{key}"',
                where=where,
                why='a message has "role" and "content"',
                fix=_FIX_ROW,
            )
        if not isinstance(value[key], str):
            raise DataError(
                f'"{key}" in {name} is {_kind_of(value[key])}',
                where=where,
                why="only text is supported, no images and no parts",
                fix=_FIX_ROW,
            )
        _refuse_surrogates(value[key], key, where)
    return {key: value[key] for key in _MESSAGE_KEYS}


def _source(value: object, where: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        _refuse("source", f"is {_kind_of(value)}", where, why="it names where the pair comes from, as text")
    _refuse_surrogates(value, "source", where)
    return value


def _split_prompt(chosen: Text, rejected: Text, where: str) -> tuple[Text, Text, Text]:
    """(prompt, chosen, rejected) of a row whose completions contain the prompt."""
    shared = _common_prefix_length(chosen, rejected)
    shortest = min(len(chosen), len(rejected))
    if isinstance(chosen, str) and _is_transcript(chosen) and _is_transcript(cast(str, rejected)):
        turn = chosen.rfind(_ASSISTANT, 0, shared)
        cut = turn + len(_ASSISTANT) if turn >= 0 else 0
    elif shared == shortest:
        cut = shortest - 1
    else:
        cut = shared - 1 if shared and chosen[shared - 1] == " " else shared
    if cut == 0:
        raise DataError(
            'there is no "prompt", and "chosen" and "rejected" begin differently',
            where=where,
            why="without a common beginning nothing says what the completions answer",
            fix='add the key "prompt", or remove the row',
        )
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _is_transcript(text: str | list[Message]) -> bool:
    return isinstance(text, str) and text.startswith(_HUMAN) and _ASSISTANT in text


def _common_prefix_length(a: Text, b: Text) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _refuse_mixture(texts: dict[str, Text], where: str) -> None:
    first, *others = texts
    for key in others:
        if type(texts[key]) is not type(texts[first]):
            raise DataError(
                f'"{first}" is {_kind_of(texts[first])}, but "{key}" is {_kind_of(texts[key])}',
                where=where,
                why="a row is text in all its parts, or messages in all",
                fix='give all parts one form; leave "prompt" out where "chosen" and "rejected" contain it',
            )


def _refuse_empty(completion: Text, key: str, where: str, *, after: str = "") -> None:
    contents = [completion] if isinstance(completion, str) else [m["content"] for m in completion]
    if not any(contents):
        what = " ".join(["is empty", after]).rstrip()
        _refuse(key, what, where, why="a completion without a token has no log-prob")


def _refuse_surrogates(text: str, key: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f'"{key}" contains half a character (a lone surrogate) at character {error.start + 1}',
            where=where,
            why="it cannot be written as UTF-8; text was cut inside a character",
            fix=_FIX_ROW,
        ) from error


def _refuse(key: str, what: str, where: str, *, why: str) -> NoReturn:
    raise DataError(f'"{key}" {what}', where=where, why=why, fix=_FIX_ROW)
