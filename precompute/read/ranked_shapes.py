"""Rows of several completions with ranks or scores, rewritten as prompt, chosen and rejected.

A row of K ranked completions is every pair of them that differs in rank (Rafailov et al. 2023, appendix C.1,
makes 6 pairs of 4); a tie prefers nothing and is refused as such, so that leaving it out is a decision.
"""

import itertools
import math
from collections.abc import Sequence
from typing import cast

from dpo_opt.precompute.read.shape_parts import (
    AROUND_KEYS,
    CARRIED_KEYS,
    PROMPT_KEYS,
    Shape,
    Values,
    agreed,
    is_empty,
    kept,
    prompt_of,
    refuse,
    refuse_tie,
    refuse_two,
    said,
)
from dpo_opt.precompute.read.strict_json import escape, kind_of, without_nulls
from dpo_opt.schemas.counts import counted
from dpo_opt.schemas.errors import DataError

_LISTS = ("completions", "responses", "answers")
_LISTS_OF_NUMBERS = ("ranks", "scores", "rewards", "rank", "score")
_SCORE_KEYS = ("score", "overall_score", "rating", "reward")
_TEXT_KEYS = ("completion", "response", "text", "content", "answer")
_SHARED_BY_ALL = AROUND_KEYS | {"prompt", "tools", "chat_template_kwargs"}
_MOST_COMPLETIONS = 256  # of one prompt; they are up to 32,640 pairs
_INSTRUCTIONS = ("system_instruction", "systemInstruction")  # Vertex documents the first; its API takes both


def _ranked(values: Values, where: str) -> list[Values]:
    key = next(key for key in _LISTS if key in values)
    completions = values[key]
    if not isinstance(completions, list) or len(completions) < 2:
        refuse(f'"{key}" is not a list of at least two completions', where)
    if len(completions) > _MOST_COMPLETIONS:
        refuse(f'"{key}" has {len(completions)} completions, and {_MOST_COMPLETIONS} is the most', where)
    goodness = _goodness(values, completions, key, where)
    prompt = prompt_of(values, where)
    texts = []
    for i, completion in enumerate(completions, 1):
        name = f'completion {i} of "{key}"'
        texts.append(_completion_text(completion, name, where))
        if isinstance(completion, dict):
            _refuse_own_prompt(completion, {**values, "prompt": prompt}, name, where)
    order = sorted(range(len(texts)), key=lambda i: -goodness[i])
    pairs = [(i, j) for i, j in itertools.combinations(order, 2) if goodness[i] > goodness[j]]
    if not pairs:
        refuse_tie(where)
    # What the row rates as chosen and rejected is not each of its pairs.
    common = {**{key: values[key] for key in CARRIED_KEYS if key in values}, "prompt": prompt}
    return [{**common, "chosen": texts[i], "rejected": texts[j]} for i, j in pairs]


def _goodness(values: Values, completions: list[object], key: str, where: str) -> list[float]:
    """One number per completion, larger is better, from a list of the row or a key of each completion."""
    beside = {name: values[name] for name in _LISTS_OF_NUMBERS if isinstance(values.get(name), list)}
    if beside:
        first, *others = beside
        goodness = _numbers(cast(list[object], beside[first]), len(completions), first, where)
        for other in others:
            if _is_opposed(goodness, cast(list[object], beside[other]), other):
                refuse_two(first, other, where)
        return goodness
    inside = {
        name: [c.get(name) if isinstance(c, dict) else None for c in completions]
        for name in ("rank", *_SCORE_KEYS)
    }
    given = [name for name, numbers in inside.items() if None not in numbers]
    if not given:
        refuse(f'"{key}" has neither ranks nor scores', where)
    goodness = _numbers(inside[given[0]], len(completions), given[0], where)
    for other in given[1:]:
        if _is_opposed(goodness, inside[other], other):
            refuse_two(given[0], other, where, inside=f'each completion of "{key}"')
    return goodness


def _is_opposed(goodness: list[float], found: list[object], name: str) -> bool:
    """Whether a list that is not read prefers some completion over one that ``goodness`` puts before it."""
    numbers = [value for value in found if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) != len(found) or len(found) != len(goodness):
        return False  # it ranks nothing
    sign = -1 if name.startswith("rank") else 1
    both = itertools.combinations(zip(goodness, numbers, strict=True), 2)
    return any(
        sign * (read - other_read) * (value - other) < 0 for (read, value), (other_read, other) in both
    )


def _numbers(found: Sequence[object], count: int, name: str, where: str) -> list[float]:
    if len(found) != count:
        refuse(f'"{name}" has {counted(len(found), "value")} for {counted(count, "completion")}', where)
    numbers = []
    for value in found:
        if isinstance(value, bool) or not isinstance(value, int | float):
            refuse(f'"{name}" holds {kind_of(value)} where a number is expected', where)
        if not -math.inf < value < math.inf:
            refuse(f'"{name}" holds {value:g}, which ranks nothing', where)
        numbers.append(-value if name.startswith("rank") else value)
    return numbers


def _completion_text(completion: object, name: str, where: str) -> object:
    if not isinstance(completion, dict):
        return completion
    found = [key for key in _TEXT_KEYS if key in completion]
    if not found:
        refuse(f"{name} has none of the keys {', '.join(_TEXT_KEYS)}", where)
    first, *others = [key for key in found if not is_empty(completion[key])] or found
    for other in others:
        if completion[other] != completion[first]:
            refuse_two(first, other, where, inside=name)
    return completion[first]


def _refuse_own_prompt(completion: Values, row: Values, name: str, where: str) -> None:
    """Refuse a completion that was given to something else than the prompt of all."""
    for key in sorted(completion.keys() & _SHARED_BY_ALL):
        value = completion[key]
        if not is_empty(value) and value not in (row.get(key), row["prompt"]):
            raise DataError(
                f'{name} has the key "{key}", and the row says nothing like it',
                where=where,
                why="all completions of a row have one prompt; what one alone was given would be left out",
                fix=f'write it as "{key}" of the row if all were given it, or remove it from the completions',
                kind="prompt_column",
            )


def _nectar(values: Values, where: str) -> list[Values]:
    """Ranked answers, with one source for each part that the prompt was taken from."""
    source = values.get("source")
    if isinstance(source, list) and all(isinstance(part, str) for part in source):
        values = {**values, "source": ", ".join(source) or None}
    return _ranked(values, where)


def _vertex(values: Values, where: str) -> list[Values]:
    """The pair of a row of Vertex AI: turns in parts, and two completions with scores."""
    contents, completions = values["contents"], values["completions"]
    if not isinstance(contents, list) or not isinstance(completions, list):
        refuse('"contents" and "completions" are not two lists', where)
    if len(completions) != 2:
        refuse(f'"completions" has {counted(len(completions), "completion")} where two are expected', where)
    given = [key for key in _INSTRUCTIONS if values.get(key)]
    system = agreed({key: _joined_parts(values[key], "the instruction", where) for key in given}, where)
    prompt = [said("system", system)] if given else []
    prompt += [_turn(turn, f'turn {i} of "contents"', where) for i, turn in enumerate(contents, 1)]
    sides = []
    for i, completion in enumerate(completions, 1):
        name = f'completion {i} of "completions"'
        if not isinstance(completion, dict) or "completion" not in completion:
            refuse(f'{name} has no "completion"', where)
        sides.append({**completion, "completion": [_turn(completion["completion"], name, where)]})
    return _ranked({**kept(values), "prompt": prompt, "completions": sides}, where)


def _turn(turn: object, name: str, where: str) -> Values:
    roles = {"user": "user", "model": "assistant"}
    role = turn.get("role") if isinstance(turn, dict) else None
    if not isinstance(turn, dict) or not isinstance(role, str) or role not in roles:
        refuse(f'{name} has neither the role "user" nor "model"', where)
    others = {key: value for key, value in turn.items() if key not in ("role", "parts", "name")}
    other = next((key for key, value in others.items() if not is_empty(value)), None)
    if other is not None:
        refuse(f'{name} has the key "{escape(other)}", which no chat template is given', where)
    named = {} if is_empty(turn.get("name")) else {"name": turn["name"]}
    return {**said(roles[role], _joined_parts(turn, name, where)), **named}


def _joined_parts(turn: object, name: str, where: str) -> str:
    parts = turn.get("parts") if isinstance(turn, dict) else None
    if not isinstance(parts, list) or not parts:
        refuse(f'{name} has no "parts"', where)
    found = [without_nulls(part) for part in parts]
    texts = [part["text"] for part in found if isinstance(part, dict) and part.keys() == {"text"}]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        refuse(f"{name} has a part that is not text", where)
    return "".join(texts)


RANKED_SHAPES = (
    Shape(
        "Vertex AI preferences",
        frozenset({"contents", "completions"}),
        _vertex,
        absent=frozenset(PROMPT_KEYS),
        also=frozenset(_INSTRUCTIONS),
    ),
    Shape("ranked completions", frozenset({"completions"}), _ranked, ranked=True),
    Shape(
        "ranked completions",
        frozenset({"responses"}),
        _ranked,
        ranked=True,
        absent=frozenset({"suggestions"}),  # Argilla's records have both
    ),
    Shape("ranked completions", frozenset({"answers"}), _nectar, ranked=True),
)
