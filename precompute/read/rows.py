"""One source row, checked: raw values become preference pairs, or an error that names the row.

Common loaders fill a missing key with null and accept a file that is text in one row and messages in the
next; each of these reaches the loss as an ordinary number. Here every row is what it says, or it is refused
with its line. ``shared_prompt`` finds the prompt of a row that has no key of it.
"""

from collections.abc import Mapping
from typing import NamedTuple, NoReturn, cast

from dpo_opt.precompute.read.foreign_forms import refuse_foreign
from dpo_opt.precompute.read.messages import (
    read_messages,
    refuse_roles,
    refuse_surrogates,
    refuse_text_of_messages,
    refuse_unwritable,
)
from dpo_opt.precompute.read.numbers_of_rows import margin_of, number_of, ratings_of
from dpo_opt.precompute.read.prompt_columns import joined
from dpo_opt.precompute.read.shape_parts import (
    AROUND_KEYS,
    CARRIED_KEYS,
    PROMPT_KEYS,
    RATINGS,
    SYSTEM_KEYS,
    Values,
    is_empty,
    said,
)
from dpo_opt.precompute.read.shapes import find_shape
from dpo_opt.precompute.read.shared_prompt import answered, is_transcript, split_prompt
from dpo_opt.precompute.read.strict_json import FIX_ROW, escape, kind_of, parse_json, quote, without_nulls
from dpo_opt.precompute.read.wrapped_rows import refuse_wrapped
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import Message, PreferencePair, Text


class Form(NamedTuple):
    """The form of a row; all rows of a source have the same form."""

    name: str
    """For people."""
    rules: str
    """Rows with the same rules become ids in the same way."""
    ranked: bool = False
    """A row may be any number of pairs."""
    unpaired: bool = False
    """A row is one completion with its label."""


_SIDES = ("chosen", "rejected")
_ANOTHER_KEY = f"{FIX_ROW}; --column {{}}=NAME reads it from another key"


class PromptRow(NamedTuple):
    """A prompt alone, with what a chat template is shown beside it."""

    prompt: Text
    where: str
    tools: list[object] | None
    chat_template_kwargs: dict[str, object] | None


def to_pairs(
    values: Values, *, where: str, column: Mapping[str, str] | None = None
) -> tuple[list[PreferencePair], Form]:
    """Check a row's values and find its pairs: one, or several of a row of ranked completions.

    Args:
        values: Key to value, as JSON or Parquet gives it.
        where: Names the row in messages.
        column: From a part of the row to the column that the user said it is in.

    Returns:
        The pairs, all numbered 0, and the row's form.

    Raises:
        DataError: A key is missing, a value is of the wrong kind or empty, or there is no common prompt.
    """
    shape = find_shape(values)
    if shape is None and "prompt" in values and values["prompt"] is None:
        # A table has the column in every row; a row of another form leaves it empty.
        others = {key: value for key, value in values.items() if key != "prompt"}
        shape = find_shape(others)
        values = values if shape is None else others
    is_alone = values.keys().isdisjoint(AROUND_KEYS)
    if shape is None and "chosen" in values and "rejected" in values:
        if not is_alone:
            values = joined(values, values, column=column or {}, is_form=False, where=where)
        pair, form = _to_pair(values, where)
        return [pair], form
    if shape is None:
        refuse_foreign(values.keys(), where)
        refuse_wrapped(values, where)
        missing = "rejected" if "chosen" in values else "chosen"
        why = 'a pair needs both completions, under the keys "chosen" and "rejected"'
        _refuse_missing(missing, values, where, why=why, fix=_ANOTHER_KEY.format("chosen"))
    rows = shape.convert(values, where)
    if not is_alone or "prompt" in values:
        unread = {key: values[key] for key in values.keys() - shape.keys - shape.also}
        rows = [joined(row, unread, column=column or {}, is_form=True, where=where) for row in rows]
    called = ("completion", "completion") if shape.unpaired else _SIDES
    made = [_to_pair(row, where, called) for row in rows]
    pairs = [pair for pair, _ in made]
    if shape.unpaired:
        pairs = [pair._replace(label=bool(row["label"])) for pair, row in zip(pairs, rows, strict=True)]
    name = f"{shape.name}: {made[0][1].name}"
    return pairs, Form(name, f"{shape.name}: {made[0][1].rules}", shape.ranked, shape.unpaired)


def to_prompts(
    values: Values, *, where: str, column: Mapping[str, str] | None
) -> list[PreferencePair | PromptRow]:
    """What a row asks: its pairs, or the prompt of a row without completions, read by the same rules.

    Raises:
        DataError: As ``to_pairs``; or there is no prompt, or it is empty or of the wrong kind.
    """
    if find_shape(values) is not None or ("chosen" in values and "rejected" in values):
        return list(to_pairs(values, where=where, column=column)[0])
    if not values.keys().isdisjoint(AROUND_KEYS) and "prompt" in values:
        values = joined(values, values, column=column or {}, is_form=False, where=where)
    if "prompt" not in values:
        other = _other_prompt_key(values)
        fix = f"pass {_as_prompt(values, other)}" if other else _ANOTHER_KEY.format("prompt")
        _refuse_missing("prompt", values, where, why="there is nothing to complete", fix=fix)
    prompt = _text(values["prompt"], "prompt", where)
    if not prompt:
        _refuse("prompt", "is empty", where, why="there is nothing to complete", kind="empty")
    tools, settings = values.get("tools"), values.get("chat_template_kwargs")
    return [PromptRow(prompt, where, _tools(tools, where), _template_kwargs(settings, where))]


def _to_pair(values: Values, where: str, called: tuple[str, str] = _SIDES) -> tuple[PreferencePair, Form]:
    """The pair of a row's ``chosen`` and ``rejected``, which messages call as the row does."""
    chosen = _text(values["chosen"], called[0], where)
    rejected = _text(values["rejected"], called[1], where)
    given = values.get("prompt") if "prompt" in values else None
    prompt: Text | None = None
    if isinstance(given, str) and isinstance(chosen, list):
        if _are_answers(chosen, rejected):
            asked = read_messages([said("user", given)], "prompt", where)
            prompt, chosen, rejected = answered(asked, chosen, cast(list[Message], rejected))
            form = _TEXT_BESIDE_MESSAGES
        else:
            # UltraFeedback has the prompt twice: as text, and as the messages that both sides begin with.
            form = Form("UltraFeedback (text prompt, message lists)", 'messages without "prompt"')
    elif "prompt" in values:
        prompt = _text(given, "prompt", where)
        form = _FORMS[isinstance(chosen, list), True]
    else:
        form = _FORMS[isinstance(chosen, list), False]
    _refuse_mixture(
        dict(zip(called, (chosen, rejected), strict=True)) | ({} if prompt is None else {"prompt": prompt}),
        where,
    )
    _refuse_empty(chosen, called[0], where)
    _refuse_empty(rejected, called[1], where)
    if prompt is None:
        _refuse_other_prompt_key(values, where)
        if isinstance(chosen, str) and is_transcript(chosen) and is_transcript(cast(str, rejected)):
            form = _TRANSCRIPTS
        prompt, chosen, rejected = split_prompt(chosen, rejected, where)
        _refuse_empty(chosen, "chosen", where, after="after the prompt that both sides share")
        _refuse_empty(rejected, "rejected", where, after="after the prompt that both sides share")
        if isinstance(given, str):
            _refuse_other_prompt(given, cast(list[Message], prompt), where)
    elif isinstance(prompt, list) and not prompt:
        _refuse(
            "prompt", "is an empty list", where, why="a conversation has at least one message", kind="empty"
        )
    if isinstance(prompt, list):
        refuse_roles(cast(list[Message], chosen), called[0], where)
        refuse_roles(cast(list[Message], rejected), called[1], where)
    if values.keys().isdisjoint(_CARRIED):
        return PreferencePair(0, prompt, chosen, rejected, None, where), form
    pair = PreferencePair(
        0,
        prompt,
        chosen,
        rejected,
        _source(values.get("source"), where),
        where,
        weight=number_of(values.get("weight"), "weight", where, least=0.0),
        margin=margin_of(values, where),
        tools=_tools(values.get("tools"), where),
        chat_template_kwargs=_template_kwargs(values.get("chat_template_kwargs"), where),
        id=_id(values.get("id"), where),
        rated=ratings_of(values),
    )
    if pair.tools is not None and isinstance(prompt, str):
        _refuse(
            "tools", "stands beside plain text", where, why="only a chat template shows tools", kind="tools"
        )
    return pair, form


_CARRIED = frozenset(CARRIED_KEYS) | RATINGS.keys()
_FORMS = {
    (messages, given): Form(name, rules=name)
    for messages, kind in ((False, "text"), (True, "messages"))
    for given, how in ((False, "without"), (True, "with"))
    for name in [f'{kind} {how} "prompt"']
}
_TEXT_BESIDE_MESSAGES = Form("messages with a text prompt", 'messages with "prompt"')
_TRANSCRIPTS = Form('HH-RLHF transcripts (text without "prompt")', 'text without "prompt"')


def _text(value: object, key: str, where: str) -> Text:
    if isinstance(value, str):
        refuse_surrogates(value, key, where)
        refuse_text_of_messages(value, key, where)
        return value
    if isinstance(value, list):
        return read_messages(value, key, where)
    if isinstance(value, dict) and "role" in value:
        return read_messages([value], key, where)
    _refuse(key, f"is {kind_of(value)}", where, why="it must be text or a list of messages", kind="type")


def _source(value: object, where: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        why = "it names where the pair comes from, as text"
        _refuse("source", f"is {kind_of(value)}", where, why=why, kind="type")
    refuse_surrogates(value, "source", where)
    return value


def _id(value: object, where: str) -> str | None:
    """A text or a whole number; other values that a source calls ``id`` are ignored."""
    if isinstance(value, str):
        refuse_surrogates(value, "id", where)
        return value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _tools(value: object, where: str) -> list[object] | None:
    """JSON schemas of functions: a list, or the text of one as tables store it."""
    value = _from_text(value, "tools", where)
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        why = "it must be a list of JSON schemas, or the JSON text of one"
        _refuse("tools", f"is {kind_of(value)}", where, why=why, kind="tools")
    refuse_unwritable(value, "tools", where, kind="tools")
    return [without_nulls(tool) for tool in value]


def _template_kwargs(value: object, where: str) -> dict[str, object] | None:
    value = _from_text(value, "chat_template_kwargs", where)
    if value is None:
        return None
    if not isinstance(value, dict):
        why = "it must be an object of settings for the chat template"
        _refuse("chat_template_kwargs", f"is {kind_of(value)}", where, why=why, kind="tools")
    refuse_unwritable(value, "chat_template_kwargs", where, kind="tools")
    # A table holds every key in every row; one that is null there was not in the row.
    found = {str(name): setting for name, setting in value.items() if setting is not None}
    return found or None


def _from_text(value: object, key: str, where: str) -> object:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except (ValueError, RecursionError) as error:
        why = f"it must be JSON, as a value or as text ({quote(str(error))})"
        _refuse(key, "is text that is not JSON", where, why=why, kind="tools")


def _other_prompt_key(values: Values) -> str | None:
    return next((key for key in PROMPT_KEYS if key != "prompt" and key in values), None)


def _refuse_other_prompt_key(values: Values, where: str) -> None:
    if "prompt" not in values and (key := _other_prompt_key(values)):
        raise DataError(
            f'there is no "prompt", but the key "{key}"',
            where=where,
            why="what both completions begin with would be taken for the prompt, and this key ignored",
            fix=f"pass {_as_prompt(values, key)}, or --ignore-column {key}",
            kind="missing_key",
        )


def _as_prompt(values: Values, key: str) -> str:
    """The setting that reads the prompt from a key, and the system prompt with it where there is one."""
    system = next((name for name in SYSTEM_KEYS if not is_empty(values.get(name))), None)
    if system is None:
        return f"--column prompt={key}"
    parts = {"question": key, "system": system}
    return " ".join(f"--column {part}={name}" for part, name in parts.items() if part != name)


def _refuse_other_prompt(given: str, prompt: list[Message], where: str) -> None:
    asked = [message["content"] for message in prompt if message["role"] != "assistant"]
    if given not in asked:
        is_asked = any(message["role"] in ("user", "human") for message in prompt)
        raise DataError(
            '"prompt" is no message of the conversation that both sides begin with',
            where=where,
            why='the text in "prompt" and the messages would ask for different things',
            fix='remove "prompt", or correct the messages'
            if is_asked
            else 'write "prompt" into both sides, as the message of the user that it is',
            kind="prompt_mismatch",
        )


def _are_answers(chosen: list[Message], rejected: Text) -> bool:
    """Whether both sides begin with an answer, so that a text beside them is what was asked."""
    if isinstance(rejected, str) or not chosen or not rejected:
        return False
    return chosen[0]["role"] == rejected[0]["role"] == "assistant"


def _refuse_mixture(texts: dict[str, Text], where: str) -> None:
    first, *others = texts
    for key in others:
        if type(texts[key]) is not type(texts[first]):
            raise DataError(
                f'"{first}" is {kind_of(texts[first])}, but "{key}" is {kind_of(texts[key])}',
                where=where,
                why="a row is text in all its parts, or messages in all",
                fix='give all parts one form; leave "prompt" out where "chosen" and "rejected" contain it',
                kind="mixed_row",
            )


def _refuse_empty(completion: Text, key: str, where: str, *, after: str = "") -> None:
    if isinstance(completion, str):
        empty = not completion
    else:
        empty = not any(message["content"] or "tool_calls" in message for message in completion)
    if empty:
        what = " ".join(["is empty", after]).rstrip()
        _refuse(key, what, where, why="a completion without a token has no log-prob", kind="empty")


def _refuse_missing(key: str, values: Values, where: str, *, why: str, fix: str) -> NoReturn:
    what = f'the key "{key}" is missing (found: {quote(", ".join(map(escape, values))) or "none"})'
    raise DataError(what, where=where, why=why, fix=fix, kind="missing_key")


def _refuse(key: str, what: str, where: str, *, why: str, kind: str) -> NoReturn:
    raise DataError(f'"{key}" {what}', where=where, why=why, fix=FIX_ROW, kind=kind)
