"""Whether a template writes each thing itself that ``faithful`` found in the text, or another has its words.

A call that a template drops is found all the same if the list of tools has its name, and the question its
argument; a short answer that it drops is found in a longer one. So where something stands in other parts of
the row too, or not just once in the text, the conversation is rendered again with a word of its own in the
place of each thing, and every word must be there.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from dpo_opt.precompute.tokens.faithful import (
    THOUGHT_KEYS,
    Part,
    arguments_of,
    call_texts,
    divided_thought,
    is_forgotten,
    lost,
)
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import Message


class _Word(NamedTuple):
    word: str
    name: str
    """What it stands for, for the message of an error."""
    value: str


def refuse_hidden_losses(
    parts: list[Part], *, beside: str, write: Callable[[Part, list[Message]], str], where: str
) -> None:
    """Refuse a row of which the template leaves out what only seems to be in the text.

    Args:
        parts: As ``refuse_losses`` takes them, which found everything.
        beside: The row's tools as text.
        write: Renders a part with other messages.
        where: For the message of an error.

    Raises:
        DataError: Something is not written.
    """
    for part in parts:
        if not _doubtful(part, beside if part.name == "prompt" else ""):
            continue
        words: list[_Word] = []
        changed = [_with_words(message, i, part, words) for i, message in enumerate(part.messages)]
        try:
            text = write(part, changed)
        except DataError:
            continue  # it takes only what the row says
        for word, name, value in words:
            if word not in text:
                raise lost(name, value, where)


def _doubtful(part: Part, beside: str) -> bool:
    values = [value.strip() for value in _values(part)]
    for i, value in enumerate(values):
        if not value:
            continue
        if part.text.count(value) != 1 or value in beside:
            return True
        if any(value in other for other in (*values[:i], *values[i + 1 :])):
            return True
    return False


def _values(part: Part) -> Iterator[str]:
    for i, message in enumerate(part.messages):
        forgotten = is_forgotten(part, i)
        thought, answer = divided_thought(message) or ("", str(message["content"]))
        yield answer
        yield from (value for _, value in call_texts(message))
        if not forgotten:
            yield thought
            yield from (str(message[key]) for key in THOUGHT_KEYS if key in message)


def _with_words(message: Message, number: int, part: Part, words: list[_Word]) -> Message:
    """The message with a new word for each of its texts; the words are added to ``words``."""
    place = f'message {number + 1} of "{part.name}"'
    forgotten = is_forgotten(part, number)

    def new(name: str, value: str) -> str:
        if not value.strip():
            return value
        word = f"word{len(words)}of{part.name}"
        words.append(_Word(word, name, value))
        return word

    changed = dict(message)
    divided = divided_thought(message)
    if divided is None:
        changed["content"] = new(f'"content" of {place}', str(message["content"]))
    else:
        thought, answer = divided
        thought = thought if forgotten else new(f'the thought in "content" of {place}', thought)
        answer = new(f'"content" after the thought of {place}', answer)
        changed["content"] = f"<think>\n{thought}\n</think>\n\n{answer}"
    for key in THOUGHT_KEYS:
        if key in message and not forgotten:
            changed[key] = new(f'"{key}" in {place}', str(message[key]))
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        changed["tool_calls"] = [_call_with_words(call, place, new) for call in calls]
    return changed


def _call_with_words(call: object, place: str, new: Callable[[str, str], str]) -> object:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call_with_words(call["function"], place, new)}
    changed = dict(call)
    if isinstance(call.get("name"), str):
        changed["name"] = new(f'the name in "tool_calls" of {place}', call["name"])
    arguments = arguments_of(call)
    if isinstance(arguments, dict):
        key = "arguments" if "arguments" in call else "parameters"
        name = f'an argument in "tool_calls" of {place}'
        changed[key] = {k: new(name, v) if isinstance(v, str) else v for k, v in arguments.items()}
    return changed
