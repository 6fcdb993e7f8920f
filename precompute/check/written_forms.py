"""Pairs as rows of published formats, for ``dpo-opt convert --to``.

A row that this program would read back as another pair is refused, so nothing is lost in writing.
"""

import json
from typing import Any, NoReturn, cast

from dpo_opt.precompute.config import WrittenForm
from dpo_opt.precompute.read.rows import to_pairs
from dpo_opt.precompute.read.shape_parts import CARRIED_KEYS
from dpo_opt.precompute.tokens.tool_calls import with_arguments
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import PreferencePair, Text

_SPEAKERS = {"user": "human", "assistant": "gpt", "tool": "observation"}
_ASKING = ("human", "observation")
_TOOLS = "tools"  # each format has its own place for them


def written_rows(pair: PreferencePair, form: WrittenForm) -> list[dict[str, Any]]:
    """A pair as one row of a format, or as two of one completion and a label each.

    An unpaired row is written by ``trl`` as TRL has it, too.

    Raises:
        DataError: The format cannot say what the pair says.
    """
    if pair.label is None and form != "unpaired":
        return [_row_of_pair(pair, form)]
    if form not in ("trl", "unpaired"):
        _refuse(pair, form, "it holds pairs, and this is one completion with a label")
    sides = {True: pair.chosen, False: pair.rejected}
    carried = _carried(pair)
    if pair.label is None:
        carried.pop("margin", None)  # of two completions
    return [
        {"prompt": pair.prompt, "completion": completion, "label": label, **carried}
        for label, completion in sides.items()
        if pair.label in (None, label)
    ]


def _carried(pair: PreferencePair) -> dict[str, Any]:
    return {name: value for name in CARRIED_KEYS if (value := getattr(pair, name)) is not None}


def _row_of_pair(pair: PreferencePair, form: WrittenForm) -> dict[str, Any]:
    carried = _carried(pair)
    if form == "trl":
        return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, **carried}
    carried.pop(_TOOLS, None)
    row = {**(_openai if form == "openai" else _sharegpt)(pair), **carried}
    (found,), _ = to_pairs(row, where=pair.where)
    found, meant = _with_objects(found), _with_objects(pair._replace(row=0))
    if found != meant:
        different = next(name for name in pair._fields if _differ(found, meant, name))
        _refuse(pair, form, f'"{different}" would be read back as something else')
    return row


def _with_objects(pair: PreferencePair) -> PreferencePair:
    """The pair with the arguments of its tool calls as objects: as the text of one they say the same."""
    prompt, chosen, rejected = (
        with_arguments(part, takes="object") if isinstance(part, list) else part
        for part in (pair.prompt, pair.chosen, pair.rejected)
    )
    return pair._replace(prompt=prompt, chosen=chosen, rejected=rejected)


def _differ(one: PreferencePair, other: PreferencePair, name: str) -> bool:
    return bool(getattr(one, name) != getattr(other, name))


def _openai(pair: PreferencePair) -> dict[str, Any]:
    # Its arguments of a tool call are the JSON text of an object.
    prompt, chosen, rejected = (with_arguments(part, takes="text") for part in _parts(pair, "openai"))
    messages = [*prompt, *chosen, *rejected]
    calls = [call for m in messages for call in cast(list[dict[str, Any]], m.get("tool_calls", []))]
    if not all(isinstance(_function(call).get("arguments"), str) for call in calls):
        _refuse(pair, "openai", "its tool calls have arguments: an object, or the text of one")
    asked = {"messages": prompt, _TOOLS: pair.tools or [], "parallel_tool_calls": True}
    return {"input": asked, "preferred_output": chosen, "non_preferred_output": rejected}


def _sharegpt(pair: PreferencePair) -> dict[str, Any]:
    """LLaMA-Factory's ranking format: its turns alternate, and each side is one message."""
    prompt, chosen, rejected = _parts(pair, "sharegpt")
    row: dict[str, Any] = {}
    if prompt[0]["role"] == "system":
        row["system"] = prompt[0]["content"]
        prompt = prompt[1:]
    if len(chosen) != 1 or len(rejected) != 1:
        _refuse(pair, "sharegpt", "each side of it is one message")
    turns = [_turn(message, pair) for message in prompt]
    sides = [_turn(chosen[0], pair), _turn(rejected[0], pair)]
    asks = [turn["from"] in _ASKING for turn in turns]
    if len(turns) % 2 == 0 or asks != [i % 2 == 0 for i in range(len(turns))]:
        _refuse(pair, "sharegpt", "its turns alternate, and the last is not the assistant's")
    if any(side["from"] in _ASKING for side in sides):
        _refuse(pair, "sharegpt", "each side of it is the assistant's message")
    if pair.tools is not None:
        row[_TOOLS] = json.dumps(pair.tools, ensure_ascii=False)
    return {"conversations": turns, "chosen": sides[0], "rejected": sides[1], **row}


def _turn(message: dict[str, Any], pair: PreferencePair) -> dict[str, Any]:
    calls, role = message.get("tool_calls"), message["role"]
    other = next((key for key in message if key not in ("role", "content", "tool_calls")), None)
    if other is not None:
        _refuse(pair, "sharegpt", f'its messages have no "{other}"')
    if calls is not None:
        key = next((key for call in calls for key in call if key not in ("type", "function")), None)
        if key is not None:
            _refuse(pair, "sharegpt", f'its tool calls have no "{key}"')
        functions = [_function(call) for call in calls]
        value = json.dumps(functions[0] if len(functions) == 1 else functions, ensure_ascii=False)
        return {"from": "function_call", "value": value}
    if role not in _SPEAKERS:
        _refuse(pair, "sharegpt", f'its conversations have no turn of the role "{role}"')
    return {"from": _SPEAKERS[role], "value": message["content"]}


def _function(call: dict[str, Any]) -> dict[str, Any]:
    found = call.get("function")
    return found if isinstance(found, dict) else {}


def _parts(pair: PreferencePair, form: WrittenForm) -> list[list[dict[str, Any]]]:
    """Prompt and both sides, as messages."""
    parts: list[Text] = [pair.prompt, pair.chosen, pair.rejected]
    found: list[list[Any]] = [part for part in parts if isinstance(part, list)]
    if len(found) < len(parts):
        _refuse(pair, form, "it holds conversations, and this is plain text")
    return found


def _refuse(pair: PreferencePair, form: WrittenForm, why: str) -> NoReturn:
    raise DataError(
        f"the format {form} cannot say what this row says",
        where=pair.where,
        why=why,
        fix="pass --to trl, which holds every row, or leave the row out with --on-bad-row skip",
        kind="unwritable",
    )
