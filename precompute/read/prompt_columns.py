"""Columns around a pair that belong to its prompt: joined by a stated rule, or refused while not empty.

A column that is left out changes the question that the answers were given to, and nothing in a loss shows it.
The rules:

* ``input`` beside a text from ``instruction`` is put under it, after a line end (Alpaca).
* ``system``, ``system_prompt`` or ``system_message`` becomes the first message of a conversation. Plain text
  has no place for it.
* Another name of the prompt (``question``, ``context``, ...), and what a question is about (``document``,
  ...), counts only where it says what the prompt lacks. So does ``prompt`` in a form that has its prompt
  elsewhere.
* A conversation (``messages``) counts only where it says what prompt and completions lack; without a prompt
  it is one.
* Earlier turns (``history``) belong to a conversation; only the Alpaca form says where they stand.
* Tools count under ``tools`` alone; ``functions`` or ``chosen_tools`` may say the same.
* Images, videos and sounds are never read.
"""

from collections.abc import Mapping
from typing import NoReturn

from dpo_opt.precompute.read.messages import FIRST_ROLES
from dpo_opt.precompute.read.shape_parts import (
    AROUND_KEYS,
    BACKGROUND_KEYS,
    CONVERSATION_KEYS,
    HISTORY_KEYS,
    MEDIA,
    PROMPT_KEYS,
    SYSTEM_KEYS,
    TOOL_KEYS,
    Values,
    agreed,
    is_empty,
    said,
)
from dpo_opt.precompute.read.shared_prompt import answered
from dpo_opt.precompute.read.strict_json import kind_of
from dpo_opt.schemas.errors import DataError, quoted

_LONGEST_PHRASE = 40  # characters; what is longer stands in a text by no chance
_SENTENCE_ENDS = frozenset(".!?:\u3002\uff01\uff1f\u2026\n")


def joined(row: Values, beside: Values, *, column: Mapping[str, str], is_form: bool, where: str) -> Values:
    """A row with what stands beside its pair.

    Args:
        row: ``chosen``, ``rejected`` and, as a rule, ``prompt``; or ``prompt`` alone.
        beside: The other columns of the row.
        column: From a part of the row to the column that the user said it is in.
        is_form: The row was rewritten from a published form, and ``beside`` is what that did not read.
        where: Names the row in messages.

    Returns:
        The row; its prompt, or both sides where they contain it, as the module's rules make them.

    Raises:
        DataError: A column is not empty, and no rule says how it is part of the prompt.
    """
    around = AROUND_KEYS | {"prompt"} if is_form else AROUND_KEYS
    filled = {key: beside[key] for key in beside.keys() & around if not is_empty(beside[key])}
    if not filled:
        return row
    refuse_media(filled, where)
    prompt = row.get("prompt")
    same = (key for key in PROMPT_KEYS if key in beside and beside[key] == prompt)
    named = column.get("prompt") or next(same, "")
    if not is_form and "prompt" not in row and not beside.keys().isdisjoint(PROMPT_KEYS):
        return row  # which is refused, with the setting that reads its prompt
    for key in (key for key in (*PROMPT_KEYS, *BACKGROUND_KEYS) if key in filled and key != named):
        more = filled[key]
        if (named, key) == ("instruction", "input") and isinstance(prompt, str) and isinstance(more, str):
            row = {**row, "prompt": f"{prompt}\n{more}"}
        elif not _is_said(more, row):
            _refuse_more(key, where)
    for key in (key for key in CONVERSATION_KEYS if key in filled and "chosen" in row):
        if not _is_repeated(filled[key], row):
            _refuse_more(key, where)
    for key in (key for key in HISTORY_KEYS if key in filled):
        reads = named == "instruction" and key == "history"
        fix = _read_otherwise(row, named, key, column, is_form) if reads else None
        _refuse(key, where, why="nothing says where these turns stand in the prompt", fix=fix)
    for key in (key for key in TOOL_KEYS if key in filled and filled[key] != row.get("tools")):
        fix = 'rename it to "tools", with each function as {"type": "function", "function": ...}'
        _refuse(key, where, why='chat templates are shown what is in "tools"', fix=fix)
    systems = {key: filled[key] for key in SYSTEM_KEYS if key in filled}
    if not systems:
        return row
    return _with_system(row, agreed(systems, where), next(iter(systems)), named, column, is_form, where)


def refuse_media(values: Mapping[str, object], where: str) -> None:
    """Refuse a row with an image, a video or a sound.

    Raises:
        DataError: It has one.
    """
    key = next((key for key in MEDIA if key in values and not is_empty(values[key])), None)
    if key is not None:
        raise DataError(
            f'"{key}" is not empty',
            where=where,
            why="only text is trained on, and the answers speak of what is left out",
            fix=f"remove the row, or pass --ignore-column {key} to train on the text alone",
            kind="prompt_column",
        )


def _is_said(more: object, row: Values) -> bool:
    """Whether a text stands in the prompt already, or in both sides where they contain it."""
    if not isinstance(more, str):
        return more == row.get("prompt")
    parts = [row["prompt"]] if "prompt" in row else [row["chosen"], row["rejected"]]
    return all(any(_stands_in(more, text) for text in _texts(part)) for part in parts)


def _stands_in(more: str, text: str) -> bool:
    """Whether a text is contained in another as a part of its own, and not as words of a sentence."""
    more = more.strip()
    if len(more) > _LONGEST_PHRASE:
        return more in text
    at = text.find(more)
    while at >= 0:
        before, behind = text[:at].rstrip(" \t")[-1:], text[at + len(more) :].lstrip(" \t")[:1]
        ended = more[-1:] in _SENTENCE_ENDS or not (behind.isalnum() or behind == ",")
        if ended and not (before.isalnum() or before == ","):
            return True
        at = text.find(more, at + 1)
    return False


def _is_repeated(conversation: object, row: Values) -> bool:
    """Whether all turns of a conversation are in the prompt, or in the chosen side, too."""
    parts = [row[key] for key in ("prompt", "chosen") if key in row]
    if not isinstance(conversation, list) or conversation in parts:
        return isinstance(conversation, list)
    known = [turn for part in parts for turn in (part if isinstance(part, list) else [part])]
    texts = {text.strip() for text in _texts(known)}
    whole = [part for part in parts if isinstance(part, str)]
    for turn in conversation:
        if turn in known:
            continue
        text = (turn.get("content") or turn.get("value")) if isinstance(turn, dict) else turn
        if not isinstance(text, str):
            return False
        if text.strip() not in texts and not any(_stands_in(text, part) for part in whole):
            return False
    return True


def _texts(part: object) -> list[str]:
    messages = part if isinstance(part, list) else [part]
    contents = [m.get("content") if isinstance(m, dict) else m for m in messages]
    parts = [p for content in contents for p in (content if isinstance(content, list) else [content])]
    texts = [p.get("text") if isinstance(p, dict) else p for p in parts]
    return [text for text in texts if isinstance(text, str)]


def _with_system(
    row: Values,
    system: object,
    key: str,
    named: str,
    column: Mapping[str, str],
    is_form: bool,
    where: str,
) -> Values:
    if not isinstance(system, str):
        _refuse(key, where, why=f"a system prompt is text, and this is {kind_of(system)}")
    sides = {side: _messages(row.get(side)) for side in ("chosen", "rejected")}
    prompt = row.get("prompt")
    if isinstance(prompt, list | dict):
        return {**row, "prompt": begun_with(_messages(prompt) or [], system, key, where)}
    if all(sides.values()):
        chosen, rejected = ([m for m in side or [] if isinstance(m, dict)] for side in sides.values())
        answers = all(side and side[0].get("role") == "assistant" for side in (chosen, rejected))
        if isinstance(prompt, str) and answers and [chosen, rejected] == list(sides.values()):
            parts = answered([said("system", system), said("user", prompt)], chosen, rejected)
            return {**row, **dict(zip(("prompt", "chosen", "rejected"), parts, strict=True))}
        begun = {side: begun_with(messages or [], system, key, where) for side, messages in sides.items()}
        return {**row, **begun}
    if isinstance(prompt, str) and _stands_in(system, prompt):
        return row
    fix = _read_otherwise(row, named, key, column, is_form)
    _refuse(key, where, why="plain text has no place for it, and the answers were given under it", fix=fix)


def _messages(part: object) -> list[object] | None:
    return part if isinstance(part, list) else [part] if isinstance(part, dict) else None


def begun_with(conversation: list[object], system: str, key: str, where: str) -> list[object]:
    """The conversation under a system prompt, which it may begin with already.

    Raises:
        DataError: It begins with another one.
    """
    first = conversation[0] if conversation else None
    if not isinstance(first, dict) or first.get("role") not in FIRST_ROLES:
        return [said("system", system), *conversation]
    if not _stands_in(system, "".join(_texts(first))):
        _refuse(key, where, why="the conversation begins with another system prompt")
    return conversation


def _read_otherwise(
    row: Values, named: str, key: str, column: Mapping[str, str], is_form: bool
) -> str | None:
    """The setting with which a row of text is read as a conversation; None where there is none."""
    if is_form or not isinstance(row.get("prompt"), str):
        return None
    system = f" --column system={key}" if key in SYSTEM_KEYS and key != "system" else ""
    if "prompt" in column and named in ("question", "instruction"):
        leave_out = f"leave --column prompt={named} out"
        return f"{leave_out}{f', and pass{system}' if system else ''}, to read a conversation"
    instead = f" instead of --column prompt={quoted(named)}" if "prompt" in column else ""
    return f"pass --column question={quoted(named)}{system}{instead}, to read a conversation"


def _refuse_more(key: str, where: str) -> NoReturn:
    why = "it may belong to the prompt, and nothing says where in it"
    into = "write it into the prompt"
    if key == "prompt":
        why, into = (
            "the row has its prompt elsewhere, and this is no part of it",
            "write the row with one prompt",
        )
    elif key == "documents":
        into = 'write it into the prompt, or for a template that shows documents into "chat_template_kwargs"'
    raise DataError(
        f'"{key}" is not empty',
        where=where,
        why=why,
        fix=f"{into}, as the answers were given to it, or pass --ignore-column {key} to train without it",
        kind="prompt_column",
    )


def _refuse(key: str, where: str, *, why: str, fix: str | None = None) -> NoReturn:
    ignore = f"--ignore-column {key}"
    raise DataError(
        f'"{key}" is not empty',
        where=where,
        why=why,
        fix=f"{fix}; {ignore} leaves it out" if fix else f"pass {ignore} to train without it",
        kind="prompt_column",
    )
