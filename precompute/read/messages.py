"""Checks chat messages before a template renders them: a template silently ignores keys it does not know."""

import ast
import json
import re
from typing import NoReturn

from dpo_opt.precompute.read.strict_json import FIX_ROW, escape, kind_of, parse_json, quote, without_nulls
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import Message

TEXT_OF_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")
"""The beginning of a list of messages as JSON, or as Python prints it."""
_TEXT_OF_MESSAGE = re.compile(r"""\s*\{\s*["'](role|content|from|value)["']\s*:""")
_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
FIRST_ROLES = ("system", "developer")
"""Who speaks before all others, so that a template may move the text, or write none for an empty one."""
ASKING_ROLES = frozenset({"user", "human", *FIRST_ROLES})
"""Who may not speak first in a completion; whoever comes before is prompt."""
_RESULTS = ("tool", "function", "ipython", "observation", "environment", "tool_response", "tool_result")
OTHER_ROLES = ASKING_ROLES.union(_RESULTS)
"""All roles that are known and not the assistant's."""
_SPEAKERS = OTHER_ROLES | {"assistant", "gpt", "model"}
_CALL_KEYS = ("id", "type", "index")
"""Beside what is called, as an API gives it."""
_ARGUMENTS_ELSEWHERE = ("args", "input")  # as LangChain and Anthropic write them


def read_messages(values: list[object], key: str, where: str) -> list[Message]:
    """The messages of a list, with the keys that a chat template may use.

    Raises:
        DataError: An element is no message, or has a key that nothing would use.
    """
    return [_message(value, f'message {i} of "{key}"', where) for i, value in enumerate(values, start=1)]


def refuse_text_of_messages(text: str, key: str, where: str) -> None:
    """Refuse messages that were written as text, as exports of tables often hold them.

    Raises:
        DataError: The text begins as a list of messages does.
    """
    if text[:1] not in ("[", "{", " ", "\n"):
        return
    is_list = TEXT_OF_MESSAGES.match(text) is not None
    if is_list or _TEXT_OF_MESSAGE.match(text):
        read = "json.loads"
        try:
            value = parse_json(text)
        except (ValueError, RecursionError):
            read, value = "ast.literal_eval", _as_python(text)
        if not is_list and not _is_message(value):
            return
        raise DataError(
            f'"{key}" holds {"messages" if is_list else "a message"} as text',
            where=where,
            why="it would be trained on with its brackets and quotes",
            fix=f"write it as {'a list' if is_list else 'an object'}, "
            f'which {read if value is not None else "json.loads"} makes of the text of "{key}"',
            kind="type",
        )


def _as_python(text: str) -> object:
    """The value that Python prints as a text; None where it is none."""
    try:
        value: object = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return value


def _is_message(value: object) -> bool:
    """Whether a value is a message, and no answer that happens to be an object."""
    if not isinstance(value, dict):
        return False
    speaks = value.get("role", value.get("from"))
    return ("content" in value or "value" in value) and isinstance(speaks, str) and speaks in _SPEAKERS


def refuse_roles(completion: list[Message], key: str, where: str) -> None:
    """Refuse a completion that the user or the system begins, or in which the assistant says nothing.

    Raises:
        DataError: It is one.
    """
    role = completion[0]["role"]
    if role in ASKING_ROLES:
        raise DataError(
            f'"{key}" begins with a message of the role "{role}"',
            where=where,
            why="a completion is what the model says after the prompt; this would train it to ask",
            fix='move the message to "prompt", or leave "prompt" out where both sides contain it',
            kind="role_order",
        )
    if all(message["role"] in OTHER_ROLES for message in completion):
        raise DataError(
            f'"{key}" has no message of the assistant, but of the role "{role}"',
            where=where,
            why="what a tool says would be trained on as if the model had said it",
            fix=f'end "{key}" with what the assistant said then; or {FIX_ROW}',
            kind="role_order",
        )


def refuse_surrogates(text: str, key: str, where: str) -> None:
    """Refuse text that no UTF-8 file can hold.

    Raises:
        DataError: It contains a lone surrogate.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f'"{key}" contains half a character (a lone surrogate) at character {error.start + 1}',
            where=where,
            why="it cannot be written as UTF-8; text was cut inside a character",
            fix=FIX_ROW,
            kind="surrogate",
        ) from error


def refuse_unwritable(value: object, key: str, where: str, *, kind: str) -> None:
    """Refuse a value that no JSON file can hold; tables hold many.

    Raises:
        DataError: Somewhere in it is a date, binary data, NaN, infinity or a lone surrogate.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(
            f'"{key}" holds what JSON cannot ({quote(str(error))})',
            where=where,
            why="it is shown to the chat template, and recorded, as JSON",
            fix=FIX_ROW,
            kind=kind,
        ) from error
    refuse_surrogates(text, key, where)


def _message(value: object, name: str, where: str) -> Message:
    if not isinstance(value, dict):
        _refuse(f"{name} is {kind_of(value)}", where, why='a message is an object with "role" and "content"')
    # A table holds every key in every message; one that is null there was not in the message.
    message: Message = {key: member for key, member in value.items() if member is not None}
    if "role" not in value:
        hint = ' (it has "from" and "value")' if {"from", "value"} <= value.keys() else ""
        _refuse(f'{name} lacks "role"{hint}', where, why='a message has "role" and "content"')
    if "content" not in value and not message.get("tool_calls"):
        _refuse(f'{name} lacks "content"', where, why='a message has "role" and "content"')
    unknown = next((key for key in message if key not in _KEYS), None)
    if unknown is not None:
        _refuse(
            f'{name} has the key "{escape(unknown)}", which no chat template is given',
            where,
            why="ignoring it would train on another conversation than the one in the data",
        )
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = _joined_parts(content, name, where)
    if message.get("tool_calls"):
        calls = message["tool_calls"]
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            _refuse(f'"tool_calls" in {name} is {kind_of(calls)}', where, why="it must be a list of objects")
        refuse_unwritable(calls, "tool_calls", where, kind="message")
        message["tool_calls"] = [_call(without_nulls(call), name, where) for call in calls]
        message.setdefault("content", "")
    else:
        message.pop("tool_calls", None)
    for key, member in {"role": None, "content": None, **message}.items():
        if key == "tool_calls":
            continue
        if not isinstance(member, str):
            _refuse(
                f'"{key}" in {name} is {kind_of(member)}',
                where,
                why="it must be text",
            )
        refuse_surrogates(member, key, where)
    return message


def _call(call: object, name: str, where: str) -> object:
    """A tool call, whose arguments stand where templates and this program look for them."""
    if not isinstance(call, dict):
        return call
    function = call
    if "function" in call:
        function = call["function"]
        if not isinstance(function, dict):
            what = f'"function" in "tool_calls" of {name} is {kind_of(function)}'
            _refuse(what, where, why='it must be an object with "name" and "arguments"')
        _refuse_other_keys(call, ("function", *_CALL_KEYS), name, where)
    arguments = "arguments" if "arguments" in function else "parameters"
    beside = _CALL_KEYS if function is call else ()
    _refuse_other_keys(function, ("name", arguments, *beside), name, where)
    if isinstance(function.get(arguments), str):
        _refuse_text_of_arguments(function[arguments], name, where)
    return call


def _refuse_other_keys(call: dict[str, object], known: tuple[str, ...], name: str, where: str) -> None:
    unknown = next((key for key in call if key not in known), None)
    if unknown is not None:
        moved = unknown in _ARGUMENTS_ELSEWHERE and "function" not in call and "arguments" not in call
        _refuse(
            f'a call in "tool_calls" of {name} has the key "{escape(unknown)}", which few templates read',
            where,
            why="what it says would be left out: the call would be trained on without it",
            fix=f'rename it to "arguments", which templates read; or {FIX_ROW}' if moved else FIX_ROW,
        )


def _refuse_text_of_arguments(text: str, name: str, where: str) -> None:
    """Refuse a text that templates would write as no JSON, or as another object than it says."""
    if not text.strip():
        _refuse(
            f'the arguments in "tool_calls" of {name} are an empty text',
            where,
            why="some templates write no JSON then, and some no arguments",
            fix='write a call without arguments with "arguments": {}',
        )
    try:
        parse_json(text)
    except json.JSONDecodeError:
        return  # which some templates write as it is
    except (ValueError, RecursionError) as error:
        what = f'the arguments in "tool_calls" of {name} are not readable as JSON ({quote(str(error))})'
        _refuse(what, where, why="templates that take an object would write another one")


def _joined_parts(parts: list[object], name: str, where: str) -> str:
    """The text of a content in parts, with nothing between them, as the templates that take parts join it."""
    texts = []
    for i, part in enumerate(parts, start=1):
        place = f'part {i} of "content" in {name}'
        if not isinstance(part, dict):
            _refuse(f"{place} is {kind_of(part)}", where, why='a part is an object with "type" and "text"')
        # A table gives every part the keys of all others.
        present = {key: member for key, member in part.items() if member is not None}
        kind = present.pop("type", None)
        if kind != "text":
            found = f'of the type "{escape(kind)}"' if isinstance(kind, str) else 'without a "type"'
            fix = (
                'give only parts of the type "text"; `dpo-opt convert DATA --output DIR` leaves such rows out'
            )
            _refuse(
                f"{place} is {found}", where, why="only text is trained on; the part would be lost", fix=fix
            )
        text = present.pop("text", None)
        if not isinstance(text, str):
            _refuse(f'"text" in {place} is {kind_of(text)}', where, why="it must be text")
        if present:
            why = "ignoring it would train on another conversation than the one in the data"
            _refuse(f'{place} has the key "{escape(next(iter(present)))}" beside its text', where, why=why)
        texts.append(text)
    return "".join(texts)


def _refuse(what: str, where: str, *, why: str, fix: str = FIX_ROW) -> NoReturn:
    raise DataError(what, where=where, why=why, fix=fix, kind="message")
