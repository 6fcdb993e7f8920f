"""In which form a chat template takes the arguments of a tool call: as an object, or as the text of one.

Data holds either. A template that writes an object as JSON would write a text as JSON too, in quotes and with
every quote in it escaped; one that joins text fails on an object, or prints it as Python does.
"""

import json
from collections.abc import Callable
from typing import Literal

from dpo_opt.schemas.pairs import Message

Form = Literal["object", "text", "both"]

_PROBE = "probe"


def has_calls(messages: list[Message]) -> bool:
    """Whether a message calls a tool."""
    return any("tool_calls" in message for message in messages)


def taken(write: Callable[[list[Message]], str]) -> Form:
    """The form that a template takes, by a probe; ``both`` where neither shows a difference.

    Args:
        write: Renders messages; an exception is a form that it does not take.
    """
    found = {}
    for form, arguments in (("object", {_PROBE: _PROBE}), ("text", json.dumps({_PROBE: _PROBE}))):
        call = {"id": "call00000", "type": "function", "function": {"name": _PROBE, "arguments": arguments}}
        question: Message = {"role": "user", "content": _PROBE}
        try:
            text = write([question, {"role": "assistant", "content": "", "tool_calls": [call]}])
        # A template is a program of its own, and may fail in any way.
        except Exception:
            found[form] = False
            continue
        escaped, printed = f'\\"{_PROBE}' in text, f"'{_PROBE}':" in text
        found[form] = _PROBE in text and not escaped and not printed
    if found["object"] == found["text"]:
        return "both"
    return "object" if found["object"] else "text"


def with_arguments(messages: list[Message], *, takes: Form) -> list[Message]:
    """The messages with the arguments of their calls in a form; a text that is no object stays text."""
    if takes == "both":
        return messages
    change = _to_object if takes == "object" else _to_text
    return [
        {**message, "tool_calls": [_changed(call, change) for call in calls]}
        if isinstance(calls := message.get("tool_calls"), list)
        else message
        for message in messages
    ]


def _changed(call: object, change: Callable[[object], object]) -> object:
    if not isinstance(call, dict):
        return call
    if isinstance(function := call.get("function"), dict):
        return {**call, "function": _changed(function, change)}
    return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call


def _to_object(arguments: object) -> object:
    if not isinstance(arguments, str):
        return arguments
    try:
        found = json.loads(arguments)
    except ValueError:
        return arguments
    return found if isinstance(found, dict) else arguments


def _to_text(arguments: object) -> object:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments
