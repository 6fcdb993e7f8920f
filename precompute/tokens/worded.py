"""A conversation with a word of its own in the place of each thing that it says.

What a chat template does to such words, it does to every conversation of the same shape: the same roles, keys
and calls in the same order, the same messages empty, the same texts equal.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from dpo_opt.precompute.tokens.faithful import (
    THOUGHT_KEYS,
    arguments_of,
    divided_thought,
    functions_of,
    last_user,
    names_of_calls,
)
from dpo_opt.schemas.pairs import Message

_NUMBERS = 734_000_000
"""Numbers from here on stand for numbers; nothing else is likely to write them."""


class Thing(NamedTuple):
    """What stands in a conversation, and the word in its place."""

    word: str
    name: str
    """What it is, for the message of an error; the place of its message follows."""
    value: str


class Worded(NamedTuple):
    """Messages made of words."""

    messages: list[Message]
    things: list[list[Thing]]
    """Of each message, all that a template must write."""


Named = Mapping[tuple[str, str], str]
"""Words that are given: of a kind of text, and a text."""


def worded(
    prompt: list[Message],
    completions: list[list[Message]],
    *,
    named: Named | None = None,
    zeros: bool = False,
) -> list[Worded]:
    """The words of a prompt with each completion.

    Equal texts have equal words, so that a template which writes the second of two equal messages not at all
    does the same to the words.

    Args:
        prompt: Messages.
        completions: Messages that follow them.
        named: Words that the calls of these tools and parameters have, too.
        zeros: Keep an argument that is 0: a template may leave out what is, as its key shows then.
    """
    words = _Words(_called(prompt), named or {}, zeros)
    forgotten = last_user(prompt)
    begun = [_message(words, message, forgotten=i < forgotten) for i, message in enumerate(prompt)]
    found = []
    for completion in completions:
        own = words.behind(_called(completion))
        all_of_it = [*begun, *(_message(own, message, forgotten=False) for message in completion)]
        found.append(Worded([message for message, _ in all_of_it], [things for _, things in all_of_it]))
    return found


def _called(messages: list[Message]) -> set[str]:
    return {name for message in messages for name in names_of_calls(message)}


_KINDS = {"the name of a tool": "name", "a parameter of a tool": "argument"}


def names_of_tools(things: list[Thing]) -> Named:
    """The words of tools' names and parameters, for those who call them."""
    return {(_KINDS[thing.name], thing.value): thing.word for thing in things if thing.name in _KINDS}


def worded_tools(tools: list[object], *, alike: bool = False) -> tuple[list[object], list[Thing]]:
    """A row's tools with words for their names, descriptions and parameters.

    Args:
        tools: The row's.
        alike: Whether equal names have equal words.
    """
    things: list[Thing] = []
    known: dict[tuple[str, str], str] = {}

    def new(name: str, value: object) -> object:
        if not isinstance(value, str) or not value.strip():
            return value
        word = f"tool{len(things)}x"
        things.append(Thing(known.setdefault((name, value), word) if alike else word, name, value))
        return things[-1].word

    def of_function(function: dict[str, object]) -> dict[str, object]:
        changed = dict(function)
        for key in ("name", "description"):
            if key in function:
                changed[key] = new(f"the {key} of a tool", function[key])
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        if isinstance(parameters, dict) and isinstance(properties, dict):
            names = {key: new("a parameter of a tool", key) for key in properties}
            changed["parameters"] = {
                **parameters,
                "properties": {names[key]: value for key, value in properties.items()},
                **_required(parameters.get("required"), names),
            }
        return changed

    changed: list[object] = []
    for tool in tools:
        if not isinstance(tool, dict):
            changed.append(tool)
        elif isinstance(tool.get("function"), dict):
            changed.append({**tool, "function": of_function(tool["function"])})
        else:
            changed.append(of_function(tool))
    return changed, things


def _required(required: object, names: dict[str, object]) -> dict[str, object]:
    if not isinstance(required, list):
        return {}
    return {"required": [names.get(name, name) if isinstance(name, str) else name for name in required]}


def worded_documents(documents: object) -> tuple[object, list[Thing]]:
    """A row's documents with words for their texts."""
    things: list[Thing] = []

    def changed(value: object) -> object:
        if isinstance(value, list):
            return [changed(member) for member in value]
        if isinstance(value, dict):
            return {key: changed(member) for key, member in value.items()}
        if not isinstance(value, str) or not value.strip():
            return value
        things.append(Thing(f"document{len(things)}x", "a text", value))
        return things[-1].word

    return changed(documents), things


class _Words:
    """Gives each text of a kind a word, and equal ones the same.

    Args:
        called: The names of the tools that the conversation calls.
        named: Words that are given.
        zeros: An argument that is 0 stays.
    """

    def __init__(self, called: set[str], named: Named, zeros: bool) -> None:
        self.called, self._named, self.zeros = called, named, zeros
        self._words: dict[tuple[str, str], str] = dict(named)
        self._ids: dict[str, str] = {}
        self._count = 0

    def behind(self, called: set[str]) -> "_Words":
        """For a completion: its texts are its own, also where the prompt has the same."""
        words = _Words(self.called | called, self._named, self.zeros)
        words._ids, words._count = dict(self._ids), self._count
        return words

    def of(self, kind: str, value: str) -> str:
        word = self._words.get((kind, value))
        if word is None:
            self._count += 1
            sign, number = "-" if value.startswith("-") else "", _NUMBERS + self._count
            numbers = {"number": f"{sign}{number}", "fraction": f"{sign}{number}.25"}
            word = numbers.get(kind, f"word{self._count}x")
            self._words[kind, value] = word
        return word

    def of_id(self, value: str, name: str | None) -> str:
        """What stands for the id of a call: of the form that the strictest templates ask for.

        Some ids hold the name of what is called, and some templates write that name nowhere else.
        """
        if value not in self._ids:
            word = f"call{len(self._ids):05d}"
            self._ids[value] = value.replace(name, self.of("name", name)) if name and name in value else word
        return self._ids[value]


def _message(words: _Words, message: Message, *, forgotten: bool) -> tuple[Message, list[Thing]]:
    content = str(message["content"])
    things: list[Thing] = []

    def new(kind: str, name: str, value: str, *, must: bool = True) -> str:
        if not value.strip():
            return value
        word = words.of(kind, value)
        if must:
            things.append(Thing(word, name, value))
        return word

    changed = dict(message)
    divided = divided_thought(message)
    if divided is None:
        changed["content"] = new("content", '"content" of', content)
    else:
        thought = new("thought", 'the thought in "content" of', divided[0], must=not forgotten)
        answer = new("content", '"content" after the thought of', divided[1])
        # As the row has them around the words: a template may look for a tag or a line end.
        begun = content.strip().removesuffix(divided[1]).removesuffix(f"{divided[0]}</think>")
        changed["content"] = f"{begun}{_in_place(thought, divided[0])}</think>{_in_place(answer, divided[1])}"
    if len(message) == len(("role", "content")):
        return changed, things
    for key in THOUGHT_KEYS:
        if key in message:
            changed[key] = new("thought", f'"{key}" in', str(message[key]), must=not forgotten)
    if "name" in message:
        known = message["name"] in words.called
        changed["name"] = new("name", '"name" of', str(message["name"]), must=not known)
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        changed["tool_calls"] = [_call(words, call, new) for call in calls]
    if "tool_call_id" in message:
        changed["tool_call_id"] = words.of_id(str(message["tool_call_id"]), None)
    return changed, things


def _in_place(word: str, value: str) -> str:
    """A word with the white space that stands around a text."""
    bare = value.strip()
    return value.replace(bare, word, 1) if bare else value


_IN_CALLS = 'in "tool_calls" of'


def _call(words: _Words, call: object, new: Callable[[str, str, str], str]) -> object:
    if not isinstance(call, dict):
        return call
    changed = dict(call)
    function = next(functions_of([call]), call)
    if isinstance(call.get("id"), str):
        changed["id"] = words.of_id(call["id"], str(function.get("name", "")))
    if function is not call:
        changed["function"] = _call(words, function, new)
        return changed
    if isinstance(call.get("name"), str):
        changed["name"] = new("name", f"the name {_IN_CALLS}", call["name"])
    key = "arguments" if "arguments" in call else "parameters"
    arguments = arguments_of(call)
    if isinstance(arguments, str):
        changed[key] = new("argument", f"the arguments {_IN_CALLS}", arguments)
    elif key in call:
        changed[key] = _argument(arguments, new, words.zeros)
    return changed


def _argument(value: object, new: Callable[[str, str, str], str], zeros: bool) -> object:
    """A JSON value with words for its keys and texts, and other numbers of the same sign and kind."""
    name = f"an argument {_IN_CALLS}"
    if isinstance(value, dict):
        return {
            new("argument", name, str(key)): _argument(member, new, zeros) for key, member in value.items()
        }
    if isinstance(value, list):
        return [_argument(member, new, zeros) for member in value]
    if isinstance(value, str):
        return new("argument", name, value)
    if is_zero(value) and zeros:
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return int(new("number", name, str(value)))
    if isinstance(value, float) and math.isfinite(value):
        return float(new("fraction", name, str(value)))
    return value


def is_zero(value: object) -> bool:
    """Whether a JSON value is a number that a template may take for nothing."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 0


def has_zeros(messages: list[Message]) -> bool:
    """Whether an argument of a call is 0."""

    def within(value: object) -> bool:
        members = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return is_zero(value) or any(map(within, members))

    return any(
        within(arguments_of(function))
        for message in messages
        for function in functions_of(message.get("tool_calls"))
    )
