"""Whether what a row says is in what a chat template renders of it.

A template leaves out what it does not know: a tool call, a thought, a role. The pair would then be scored for
a conversation that is not in the data, so such a row is an error that names the part.

A part is found if the text holds it, without the white space around it (templates trim), as it is or as JSON
or Python writes it in quotes. What only seems to be there, because other parts have the same words,
``hidden_losses`` finds.

One omission is the template's own design: templates of reasoning models leave the thoughts of turns before
the user's last message out of the prompt, as they do whenever the model answers. A thought in a completion is
what is trained on, and must be there.
"""

import json
import re
from collections.abc import Iterator
from typing import NamedTuple

from dpo_opt.precompute.read.strict_json import SKIP_ROW, escape
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import Message

THOUGHT_KEYS = ("reasoning_content", "thinking")
_IN_SINGLE_QUOTES = str.maketrans({"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r"})
_SCHEMAS_IN = ("items", "prefixItems", "anyOf", "oneOf", "allOf", "additionalProperties")
_THOUGHT = re.compile(r"\s*(?:<think>)?(.*?)</think>(.*)", re.DOTALL)


class Part(NamedTuple):
    """A list of messages of a pair, with the text in which the template must have written it."""

    name: str
    """``prompt``, ``chosen`` or ``rejected``."""
    messages: list[Message]
    text: str


def refuse_losses(
    parts: list[Part], *, tools: list[object] | None, documents: object, template: str, where: str
) -> None:
    """Refuse a row of which the template left something out.

    Args:
        parts: The prompt first; the text of a completion is what follows the prompt's.
        tools: The row's.
        documents: The row's, of its settings of the template; None if it has none.
        template: The chat template's source; a role that it reads or writes as one is known to it.
        where: For the message of an error.

    Raises:
        DataError: Something is not in the text, or a role is unknown to the template.
    """
    called = {name for part in parts for message in part.messages for name in names_of_calls(message)}
    for part in parts:
        position = 0
        forgotten = last_user(part.messages) if part.name == "prompt" else -1
        for i, message in enumerate(part.messages):
            place = f'message {i + 1} of "{part.name}"'
            _refuse_unknown_role(str(message["role"]), template, place, where)
            by_design = i < forgotten
            position = _after_content(message, part.text, position, by_design, place, where)
            if len(message) == len(("role", "content")):
                continue
            for key, thought in ((key, str(message[key])) for key in THOUGHT_KEYS if key in message):
                if not by_design and not _holds(part.text, thought):
                    raise lost(f'"{key}" in {place}', thought, where, part.text, _thought_fix(key, template))
            for name, value in call_texts(message):
                if not _holds(part.text, value):
                    raise lost(f'{name} in "tool_calls" of {place}', value, where, part.text)
            speaker = str(message.get("name", ""))
            if speaker not in called and not _holds(part.text, speaker):
                raise lost(f'"name" of {place}', speaker, where, part.text, _NAME_FIX)
    for name, value in _tool_texts(tools or []):
        if not _holds(parts[0].text, value):
            raise lost(f'{name} in "tools"', value, where, parts[0].text)
    for text in _texts_in(documents):
        if not _holds(parts[0].text, text):
            raise lost('a text in "documents"', text, where, parts[0].text)


def last_user(messages: list[Message]) -> int:
    """The user's last message, or -1; of a prompt, a template may leave out the thoughts before it."""
    return max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)


def forgets(prompt: Part) -> bool:
    """Whether the template leaves out a thought of an earlier turn in the prompt."""
    for message in prompt.messages[: max(0, last_user(prompt.messages))]:
        in_content, _ = divided_thought(message) or ("", "")
        thoughts = [in_content, *(str(message[key]) for key in THOUGHT_KEYS if key in message)]
        if not all(_holds(prompt.text, thought) for thought in thoughts):
            return True
    return False


def _refuse_unknown_role(role: str, template: str, place: str, where: str) -> None:
    # A template that writes any role as a header, or none at all, was made for those that chat models have in
    # common. What it leaves out of them is noticed by their content.
    if role in ("user", "assistant", "system", "tool"):
        return
    from dpo_opt.precompute.tokens.known_roles import knows_role

    if knows_role(template, role):
        return
    raise DataError(
        f'the chat template does not know the role "{escape(role)}" of {place}',
        where=where,
        why="it leaves the message out, or writes a header that the model was not trained on",
        fix=f"{SKIP_ROW}; or correct the role: system, user, assistant or tool",
        kind="template_loss",
    )


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
        raise lost(f'"content" of {place} (role "{escape(str(message["role"]))}")', content, where, text)
    thought, answer = divided
    if not _holds(text, answer):
        raise lost(f'"content" after the thought of {place}', answer, where, text)
    if not by_design and not _holds(text, thought):
        raise lost(f'the thought in "content" of {place}', thought, where, text)
    return position


def divided_thought(message: Message) -> tuple[str, str] | None:
    """The thought in an assistant's content, and what follows it; None where there is no thought."""
    if message["role"] != "assistant" or "</think>" not in str(message["content"]):
        return None
    divided = _THOUGHT.fullmatch(str(message["content"]).strip())
    return None if divided is None else (divided[1], divided[2])


def _thought_fix(key: str, template: str) -> str:
    other = next((name for name in THOUGHT_KEYS if name != key and name in template), None)
    if other is not None and key not in template:
        return f'rename "{key}" to "{other}", which the template reads; or {SKIP_ROW}'
    return f"{SKIP_ROW}; or {_SHOW}"


_NAME_FIX = f'{SKIP_ROW}; or take "name" out of the messages, and write into their content who speaks'


_SHOW = "use a template that writes it: `dpo-opt preview DATA --model M` shows it"


def lost(what: str, value: str, where: str, text: str = "", fix: str | None = None) -> DataError:
    """The error of a row of which the template leaves a value out of a text, or changes it."""
    joined = "".join(value.split())
    if joined and joined in "".join(text.split()):
        said = f"changes the white space inside {what}"
    else:
        said = f"leaves out {what}"
    return refused(f"{said} ({escape(value.strip())})", where, fix)


def refused(what: str, where: str, fix: str | None = None) -> DataError:
    """The error of a row that the template does not write as it is."""
    return DataError(
        f"the chat template {what}",
        where=where,
        why="the pair would be scored and trained on as a conversation that is not in the data",
        fix=fix or f"{SKIP_ROW}; or {_SHOW}",
        kind="template_loss",
    )


def _holds(text: str, value: str) -> bool:
    """Whether a text holds a value without the white space around it, as it is or in quotes."""
    value = value.strip()
    return value in text or any(form in text for form in _quoted(value))


def _quoted(value: str) -> Iterator[str]:
    """A text as it stands in quotes of JSON, with letters of all scripts or in ASCII, and of Python.

    LFM2's templates write a text of a call in single quotes, and a tab as it is; ``repr`` takes the quotes
    that the text does not have.
    """
    yield json.dumps(value, ensure_ascii=False)[1:-1]
    yield json.dumps(value)[1:-1]
    yield repr(value)[1:-1]
    single = value.translate(_IN_SINGLE_QUOTES)
    yield single
    yield single.replace("\t", "\\t")


def call_texts(message: Message) -> Iterator[tuple[str, str]]:
    """What each call of a message says, with its name for the message of an error."""
    for function in functions_of(message.get("tool_calls")):
        yield "the name", str(function.get("name", ""))
        arguments = arguments_of(function)
        if isinstance(arguments, str):
            yield "the arguments", arguments
            continue
        for leaf in _leaves(arguments):
            yield "an argument", leaf


def functions_of(calls: object) -> Iterator[dict[str, object]]:
    """What a message's calls call, with its arguments."""
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function", call) if isinstance(call, dict) else None
        if isinstance(function, dict):
            yield function


def names_of_calls(message: Message) -> Iterator[str]:
    """The names of the tools that a message calls."""
    return (str(function.get("name", "")) for function in functions_of(message.get("tool_calls")))


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
        for parameter in _parameters(function.get("parameters")):
            yield "a parameter of a tool", parameter


def _parameters(schema: object) -> Iterator[str]:
    """The names of all properties in a JSON schema, those in others too."""
    parts = schema if isinstance(schema, list) else []
    if isinstance(schema, dict):
        properties = schema.get("properties")
        named = properties if isinstance(properties, dict) else {}
        yield from map(str, named)
        definitions = (schema.get(key) for key in ("$defs", "definitions"))
        inside = [member for found in definitions if isinstance(found, dict) for member in found.values()]
        parts = [*named.values(), *inside, *(schema.get(key) for key in _SCHEMAS_IN)]
    for part in parts:
        yield from _parameters(part)


def _texts_in(value: object) -> Iterator[str]:
    """All texts in a JSON value, without the keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for member in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(member)


def _leaves(value: object) -> Iterator[str]:
    """The keys, texts and whole numbers in a JSON value; ``hidden_losses`` looks for fractions."""
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
