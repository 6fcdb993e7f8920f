"""In which form a chat template takes the arguments of a tool call: as an object, or as the text of one.

Data holds either. A template that writes an object as JSON would write a text as JSON too, in quotes and with
every quote in it escaped; one that joins text fails on an object, or prints it as Python does.
"""

import itertools
import json
from collections.abc import Callable
from typing import Any, Literal

from dpo_opt.schemas.pairs import Message

Form = Literal["object", "text", "both"]

_PROBE = "probe"
_ID = "call00000"
_QUESTION: Message = {"role": "user", "content": _PROBE}
# What some templates want beside a call.
_SYSTEM: Message = {"role": "system", "content": _PROBE}
_ANSWER: Message = {"role": "tool", "name": _PROBE, "tool_call_id": _ID, "content": _PROBE}
_TOOL = {
    "type": "function",
    "function": {
        "name": _PROBE,
        "description": _PROBE,
        "parameters": {
            "type": "object",
            "properties": {_PROBE: {"type": "string", "description": _PROBE}},
            "required": [_PROBE],
        },
    },
}


def has_calls(messages: list[Message]) -> bool:
    """Whether a message calls a tool."""
    return any("tool_calls" in message for message in messages)


def taken(write: Callable[[list[Message], list[dict[str, Any]] | None], str]) -> Form:
    """The form that a template takes, by probes; ``both`` where it writes the same of either.

    Where it writes something of either, but not the same, it is the object, as transformers documents it: a
    text would be one more value. Where it renders no probe, too.

    Args:
        write: Renders messages and tools; an exception is a form that it does not take.
    """
    for before, after, tools in itertools.product(([], [_SYSTEM]), ([], [_ANSWER]), (None, [_TOOL])):
        written = {}
        for form, arguments in (("object", {_PROBE: _PROBE}), ("text", json.dumps({_PROBE: _PROBE}))):
            function = {"name": _PROBE, "arguments": arguments}
            call = {"id": _ID, "type": "function", "function": function}
            calling: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
            try:
                text = write([*before, _QUESTION, calling, *after], tools)
            # A template is a program of its own, and may fail in any way.
            except Exception:
                continue
            if f'\\"{_PROBE}' not in text and f"'{_PROBE}':" not in text:
                written[form] = text
        if len(written) == 2 and written["object"] == written["text"]:
            return "both"
        if written:
            return "object" if "object" in written else "text"
    return "object"


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
