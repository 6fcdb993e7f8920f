"""Whether what a row says is in what a chat template renders of it.

A template leaves out what it does not know: a tool call, a thought, a role. The pair would then be scored for
a conversation that is not in the data, so such a row is an error that names the part.

A part is found if the text holds it as it is, with other white space (templates trim), or as JSON writes it.
One omission is the template's own design: templates of reasoning models leave the thoughts of turns before
the user's last message out of the prompt, as they do whenever the model answers. A thought in a completion is
what is trained on, and must be there.
"""

import functools
import json
import re
from collections.abc import Iterator
from typing import NamedTuple

from dpo_opt.precompute.read.strict_json import SKIP_ROW, escape
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import Message

THOUGHT_KEYS = ("reasoning_content", "thinking")
_THOUGHT = re.compile(r"\s*(?:<think>)?(.*?)</think>(.*)", re.DOTALL)


class Part(NamedTuple):
    """A list of messages of a pair, with the text in which the template must have written it."""

    name: str
    """``prompt``, ``chosen`` or ``rejected``."""
    messages: list[Message]
    text: str


def refuse_losses(parts: list[Part], *, tools: list[object] | None, template: str, where: str) -> None:
    """Refuse a row of which the template left something out.

    Args:
        parts: The prompt first; the text of a completion is what follows the prompt's.
        tools: The row's.
        template: The chat template's source; a role that it names is known to it.
        where: For the message of an error.

    Raises:
        DataError: Something is not in the text, or a role is unknown to the template.
    """
    for part in parts:
        position = 0
        for i, message in enumerate(part.messages):
            place = f'message {i + 1} of "{part.name}"'
            _refuse_unknown_role(str(message["role"]), template, place, where)
            by_design = is_forgotten(part, i)
            position = _after_content(message, part.text, position, by_design, place, where)
            for key, thought in ((key, str(message[key])) for key in THOUGHT_KEYS if key in message):
                if not by_design and not _holds(part.text, thought):
                    raise lost(f'"{key}" in {place}', thought, where, _thought_fix(key, template))
            for name, value in call_texts(message):
                if not _holds(part.text, value):
                    raise lost(f'{name} in "tool_calls" of {place}', value, where)
    for name, value in _tool_texts(tools or []):
        if not _holds(parts[0].text, value):
            raise lost(f'{name} in "tools"', value, where)


def is_forgotten(part: Part, number: int) -> bool:
    """Whether a template may leave out the thought of a message, because the user spoke after it."""
    return part.name == "prompt" and any(m["role"] == "user" for m in part.messages[number + 1 :])


def forgets(prompt: Part) -> bool:
    """Whether the template leaves out a thought of an earlier turn in the prompt."""
    for i, message in enumerate(prompt.messages):
        in_content, _ = divided_thought(message) or ("", "")
        thoughts = [in_content, *(str(message[key]) for key in THOUGHT_KEYS if key in message)]
        if is_forgotten(prompt, i) and not all(_holds(prompt.text, thought) for thought in thoughts):
            return True
    return False


def _refuse_unknown_role(role: str, template: str, place: str, where: str) -> None:
    # A template that writes any role as a header, or none at all, was made for those that chat models have in
    # common. What it leaves out of them is noticed by their content.
    if role in ("user", "assistant", "system", "tool") or _names(template, role):
        return
    raise DataError(
        f'the chat template does not know the role "{escape(role)}" of {place}',
        where=where,
        why="it leaves the message out, or writes a header that the model was not trained on",
        fix=f"{SKIP_ROW}; or correct the role: system, user, assistant or tool",
        kind="template_loss",
    )


@functools.lru_cache(maxsize=64)
def _names(template: str, role: str) -> bool:
    return f"'{role}'" in template or f'"{role}"' in template


def _after_content(
    message: Message, text: str, position: int, by_design: bool, place: str, where: str
) -> int:
    """Where the message's content ends in the text; contents stand there in the order of the messages.

    Raises:
        DataError: The content is not there.
    """
    content = str(message["content"]).strip()
    at = text.find(content, position)
    if at >= 0:
        return at + len(content)
    # A template may move a message, such as the system's to the last turn of the user.
    if _holds(text, content):
        return position
    divided = divided_thought(message)
    if divided is None:
        raise lost(f'"content" of {place} (role "{escape(str(message["role"]))}")', content, where)
    thought, answer = divided
    if not _holds(text, answer):
        raise lost(f'"content" after the thought of {place}', answer, where)
    if not by_design and not _holds(text, thought):
        raise lost(f'the thought in "content" of {place}', thought, where)
    return position


def divided_thought(message: Message) -> tuple[str, str] | None:
    """The thought in an assistant's content, and what follows it; None where there is no thought."""
    content = str(message["content"]).strip()
    divided = _THOUGHT.fullmatch(content) if message["role"] == "assistant" else None
    return None if divided is None else (divided[1], divided[2])


def _thought_fix(key: str, template: str) -> str:
    other = next((name for name in THOUGHT_KEYS if name != key and name in template), None)
    if other is not None and key not in template:
        return f'rename "{key}" to "{other}", which the template reads; or {SKIP_ROW}'
    return SKIP_ROW + "; or use a template that writes it: `dpo-opt preview DATA --model M` shows it"


def lost(what: str, value: str, where: str, fix: str | None = None) -> DataError:
    """The error of a row of which the template leaves a value out."""
    return DataError(
        f"the chat template leaves out {what} ({escape(value.strip())})",
        where=where,
        why="the pair would be scored and trained on as a conversation that is not in the data",
        fix=fix or f"{SKIP_ROW}; or use a template that writes it: `dpo-opt preview DATA --model M` shows it",
        kind="template_loss",
    )


def _holds(text: str, value: str) -> bool:
    """Whether a text holds a value as it is, with other white space, or as JSON."""
    value = value.strip()
    if value in text:
        return True
    pressed = _pressed(text)
    return any("".join(form.split()) in pressed for form in (value, *_as_json(value)))


@functools.lru_cache(maxsize=4)
def _pressed(text: str) -> str:
    """A text without its white space."""
    return "".join(text.split())


def _as_json(value: str) -> tuple[str, str]:
    """A text as JSON writes it between its escapes, with letters of all scripts or in ASCII."""
    return json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1]


def call_texts(message: Message) -> Iterator[tuple[str, str]]:
    """What each call of a message says, with its name for the message of an error."""
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function", call)
        if not isinstance(function, dict):
            continue
        yield "the name", str(function.get("name", ""))
        arguments = arguments_of(function)
        if isinstance(arguments, str):
            yield "the arguments", arguments
            continue
        for leaf in _leaves(arguments):
            yield "an argument", leaf


def arguments_of(function: dict[str, object]) -> object:
    """The arguments of a call; a text that is no JSON stays one."""
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            return json.loads(arguments)
        except ValueError:
            return arguments
    return arguments


def _tool_texts(tools: list[object]) -> Iterator[tuple[str, str]]:
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict):
            continue
        for key in ("name", "description"):
            if isinstance(function.get(key), str):
                yield f"the {key} of a tool", function[key]
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        for name in properties if isinstance(properties, dict) else ():
            yield "a parameter of a tool", str(name)


def _leaves(value: object) -> Iterator[str]:
    """The keys, texts and whole numbers in a JSON value; others are written in many ways."""
    if isinstance(value, dict):
        for key, member in value.items():
            yield str(key)
            yield from _leaves(member)
    elif isinstance(value, list):
        for member in value:
            yield from _leaves(member)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int) and not isinstance(value, bool):
        yield str(value)
