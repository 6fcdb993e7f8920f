"""Rows as training libraries and platforms document them, rewritten as prompt, chosen and rejected."""

from typing import cast

from dpo_opt.precompute.read.messages import ASKING_ROLES, refuse_text_of_messages
from dpo_opt.precompute.read.prompt_columns import begun_with, refuse_media
from dpo_opt.precompute.read.shape_parts import (
    CONVERSATION_KEYS,
    MEDIA,
    PAIR_KEYS,
    Shape,
    Values,
    agreed,
    is_empty,
    kept,
    refuse,
    refuse_two,
    said,
)
from dpo_opt.precompute.read.strict_json import escape, kind_of, parse_json, without_nulls

_INPUT_KEYS = {"messages", "tools", "parallel_tool_calls"}  # the last only says how completions are sampled
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "observation": "tool"}


def _openai(values: Values, where: str) -> list[Values]:
    given = values["input"]
    if not isinstance(given, dict) or "messages" not in given:
        refuse('"input" is no object with "messages"', where)
    other = next((key for key in given if key not in _INPUT_KEYS and given[key] is not None), None)
    if other is not None:
        refuse(f'"input" has the key "{escape(other)}", which no chat template is given', where)
    tools = {"tools": agreed({"input.tools": given.get("tools"), "tools": values.get("tools")}, where)}
    chosen, rejected = values["preferred_output"], values["non_preferred_output"]
    return [{**kept(values), **tools, "prompt": given["messages"], "chosen": chosen, "rejected": rejected}]


def _swift_response(values: Values, where: str) -> list[Values]:
    refuse_media(values, where)
    messages, response = values["messages"], values["rejected_response"]
    whole = values.get("rejected_messages")
    if response is None and not is_empty(whole):
        return _swift_messages(values, where)
    if not isinstance(response, str):
        refuse(f'"rejected_response" is {kind_of(response)} where a text is expected', where)
    last = messages[-1] if isinstance(messages, list) and len(messages) > 1 else None
    if not isinstance(messages, list) or not isinstance(last, dict) or last.get("role") != "assistant":
        refuse('"messages" is no conversation that ends with an answer of the assistant', where)
    answer = said("assistant", response)
    if not is_empty(whole) and without_nulls(whole) != without_nulls([*messages[:-1], answer]):
        refuse_two("rejected_response", "rejected_messages", where)
    pair = {"prompt": messages[:-1], "chosen": [last], "rejected": [answer]}
    return [{**kept(values), **pair}]


def _swift_messages(values: Values, where: str) -> list[Values]:
    refuse_media(values, where)
    if values.get("rejected_tools") and values["rejected_tools"] != values.get("tools"):
        refuse('"rejected_tools" is not "tools", so that the sides have different prompts', where)
    return [{**kept(values), "chosen": values["messages"], "rejected": values["rejected_messages"]}]


def _ranking(values: Values, where: str) -> list[Values]:
    """LLaMA-Factory's ShareGPT format: the conversation, and one message for each side."""
    refuse_media(values, where)
    _, prompt = conversation_of(values, where)
    system = values.get("system")
    first = prompt[0] if prompt else None
    # A system message in the conversation overrides the column.
    if system and not (isinstance(first, dict) and first.get("role") == "system"):
        prompt.insert(0, said("system", system))
    sides = {side: [_sharegpt(values[side], f'"{side}"', where)] for side in ("chosen", "rejected")}
    return [{**kept(values), **sharegpt_tools(values, where), "prompt": prompt, **sides}]


def _asked(values: Values, where: str) -> list[Values]:
    """The conversation that two answers were given to; they may contain it, or it the chosen one."""
    key, prompt = conversation_of(values, where)
    sides: dict[str, object] = {}
    for side in ("chosen", "rejected"):
        value = values[side]
        if isinstance(value, str):
            refuse_text_of_messages(value, side, where)
            value = [said("assistant", value)]
        sides[side] = _turns(value, side, where) if isinstance(value, list) else value
    chosen, rejected = (without_nulls(side) for side in sides.values())
    conversation, last = without_nulls(prompt), len(prompt)
    row = {**kept(values), **sharegpt_tools(values, where), **sides}
    if not isinstance(chosen, list) or not isinstance(rejected, list) or not isinstance(conversation, list):
        return [{**row, "prompt": prompt}]  # which is refused
    if conversation == chosen or chosen[:last] == conversation == rejected[:last]:
        return [row]
    if len(chosen) < last and conversation[-len(chosen) :] == chosen:
        return [{**row, "prompt": prompt[: -len(chosen)]}]
    if any(
        isinstance(m, dict) and m.get("role") in ASKING_ROLES for side in (chosen, rejected) for m in side[:1]
    ):
        refuse_two("chosen", key, where)
    return [{**row, "prompt": prompt}]


def conversation_of(values: Values, where: str) -> tuple[str, list[object]]:
    """The conversation of a row, and its key.

    Raises:
        DataError: It is no list of messages, or stands under two keys that say different things.
    """
    keys = [key for key in CONVERSATION_KEYS if key in values]
    first_key, *other_keys = [key for key in keys if values[key] is not None] or keys
    conversation = _turns(values[first_key], first_key, where)
    for other in other_keys:
        agreed({first_key: conversation, other: _turns(values[other], other, where)}, where)
    return first_key, conversation


def _turns(conversation: object, key: str, where: str) -> list[object]:
    if not isinstance(conversation, list):
        refuse(f'"{key}" is {kind_of(conversation)} where a list of messages is expected', where)
    return [_sharegpt(turn, f'message {i} of "{key}"', where) for i, turn in enumerate(conversation, 1)]


def _sharegpt(turn: object, name: str, where: str) -> object:
    """A message of ``role`` and ``content``, of one of ``from`` and ``value``."""
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        return turn
    role, value = turn["from"], turn["value"]
    others = {key: member for key, member in turn.items() if key not in ("from", "value")}
    if role is None and value is None:
        return others
    if role == "function_call":
        call = {**said("assistant", ""), "tool_calls": _calls(value, name, where)}
        return {**others, **_as_alone(call, others, name, where)}
    if not isinstance(role, str) or role not in _SHAREGPT_ROLES:
        known = ", ".join([*_SHAREGPT_ROLES, "function_call"])
        found = f'"{escape(role)}"' if isinstance(role, str) else kind_of(role)
        refuse(f'"from" of {name} is {found}, none of {known}', where)
    return {**others, **_as_alone(said(_SHAREGPT_ROLES[role], value), others, name, where)}


def _as_alone(message: Values, others: Values, name: str, where: str) -> Values:
    """What ``from`` and ``value`` say, if ``role`` and ``content`` beside them say nothing else."""
    for key, value in message.items():
        given = others.get(key)
        same = _SHAREGPT_ROLES.get(str(given), given) if key == "role" else given
        if not is_empty(given) and same != value:
            refuse(f'{name} has "from" and "value", and another "{key}" beside them', where)
    return message


def _calls(value: object, name: str, where: str) -> list[Values]:
    """The tool calls that a ``function_call`` writes as JSON: an object, or a list of them."""
    found = _parsed(value)
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(c, dict) and c.keys() == {"name", "arguments"} for c in calls):
        refuse(f'the function call in {name} is no JSON object of "name" and "arguments"', where)
    return [{"type": "function", "function": call} for call in calls]


def sharegpt_tools(values: Values, where: str) -> Values:
    """The tools as chat templates expect them: LLaMA-Factory's column may leave ``type`` out."""
    if not values.get("tools"):
        return {"tools": None}
    tools = _parsed(values["tools"])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        refuse('"tools" is no list of JSON schemas, nor the JSON text of one', where)
    return {"tools": [t if "function" in t else {"type": "function", "function": t} for t in tools]}


def _parsed(value: object) -> object:
    """What a text says as JSON, None where it is not JSON; another value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except (ValueError, RecursionError):
        return None


def _question(values: Values, where: str) -> list[Values]:
    """One question, with the system prompt that it was asked under."""
    refuse_media(values, where)
    system, question = values["system"], values["question"]
    prompt = [said("system", system)] if system else []
    sides = {side: values[side] for side in ("chosen", "rejected")}
    answers = {k: [said("assistant", v)] if isinstance(v, str) else v for k, v in sides.items()}
    return [{**kept(values), "prompt": [*prompt, said("user", question)], **answers}]


def alpaca(values: Values, where: str) -> list[Values]:
    """An instruction with its input, a system prompt and earlier turns, each of which may be empty."""
    refuse_media(values, where)
    request, more, system = values["instruction"], values.get("input"), values.get("system")
    if not isinstance(request, str):
        refuse(f'"instruction" is {kind_of(request)} where a text is expected', where)
    if more and not isinstance(more, str):
        refuse(f'"input" is {kind_of(more)} where a text is expected', where)
    request = f"{request}\n{more}" if more else request
    turns = values.get("history") or []
    if not isinstance(turns, list) or not all(isinstance(t, list) and len(t) == 2 for t in turns):
        refuse('"history" is no list of pairs, each what the user said and what was answered', where)
    prompt = [said("system", system)] if system else []
    for asked, answered in turns:
        prompt += [said("user", asked), said("assistant", answered)]
    sides = {side: values[side] for side in ("chosen", "rejected")}
    if all(isinstance(text, str) for text in sides.values()):
        sides = {side: [said("assistant", text)] for side, text in sides.items()}
    elif not turns and all(isinstance(side, list) for side in sides.values()):
        if isinstance(system, str) and system and all(map(_is_asking, sides.values())):
            sides = {
                side: begun_with(cast(list[object], messages), system, "system", where)
                for side, messages in sides.items()
            }
            prompt = []
        if not prompt:
            return [{**kept(values), "prompt": request, **sides}]  # which may stand in both sides
    return [{**kept(values), "prompt": [*prompt, said("user", request)], **sides}]


def _is_asking(side: object) -> bool:
    """Whether a side begins with what was asked, and not with an answer."""
    first = side[0] if isinstance(side, list) and side else None
    return isinstance(first, dict) and first.get("role") in ASKING_ROLES


def _question_with_image(values: Values, where: str) -> list[Values]:
    refuse_media(values, where)
    pair = {"prompt": values["question"], "chosen": values["chosen"], "rejected": values["rejected"]}
    return [{**kept(values), **pair}]


_WITHOUT_PROMPT = frozenset({"prompt"})  # a row that has it is read by it

FRAMEWORK_SHAPES = (
    Shape("OpenAI preferences", frozenset({"input", "preferred_output", "non_preferred_output"}), _openai),
    *(
        Shape(
            "ShareGPT ranking",
            PAIR_KEYS | {key},
            _ranking,
            absent=_WITHOUT_PROMPT,
            objects=PAIR_KEYS,
            also=frozenset({*MEDIA, "system"}),
        )
        for key in CONVERSATION_KEYS
    ),
    Shape(
        "ms-swift",
        frozenset({"messages", "rejected_response"}),
        _swift_response,
        also=frozenset({*MEDIA, "rejected_messages", "rejected_tools"}),
    ),
    Shape(
        "ms-swift",
        frozenset({"messages", "rejected_messages"}),
        _swift_messages,
        also=frozenset({*MEDIA, "rejected_tools"}),
    ),
    Shape(
        "system and question",
        PAIR_KEYS | {"system", "question"},
        _question,
        absent=_WITHOUT_PROMPT,
        also=frozenset({"image"}),
    ),
    Shape(
        "Alpaca preferences",
        PAIR_KEYS | {"instruction"},
        alpaca,
        absent=_WITHOUT_PROMPT,
        also=frozenset({*MEDIA, "input", "system", "history"}),
    ),
    Shape(
        "question with image", PAIR_KEYS | {"question", "image"}, _question_with_image, absent=_WITHOUT_PROMPT
    ),
    *(
        Shape(
            "conversation and answers",
            PAIR_KEYS | {key},
            _asked,
            absent=_WITHOUT_PROMPT,
            filled=frozenset({key}),
            also=frozenset({*CONVERSATION_KEYS}),
        )
        for key in CONVERSATION_KEYS
    ),
)
