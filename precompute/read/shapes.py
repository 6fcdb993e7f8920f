"""Published shapes of preference data, rewritten as prompt, chosen and rejected.

Recognised by their keys alone, so that a row is never taken for something else because of what it says:

====================  ========================================================================  ==============
form                  keys                                                                      found in
====================  ========================================================================  ==============
pairs                 chosen, rejected, optionally prompt                                       most
SHP                   history, human_ref_A, human_ref_B, labels (1: A is preferred)             SHP, SHP-2
labelled responses    prompt, response_a, response_b, preference or winner (a, b or tie)        judge outputs
safety-labelled       prompt, response_0, response_1, better_response_id                        PKU-SafeRLHF
graded responses      context or prompt, response1, response2, overall_preference (-3 to 3)     HelpSteer3
conversations         conversation_a, conversation_b, winner (model_a, model_b, tie)            arena votes
ranked completions    prompt, completions or responses, with ranks (1 is best) or scores        UltraFeedback
====================  ========================================================================  ==============

A row of K ranked completions is every pair of them that differs in rank (Rafailov et al. 2023, appendix C.1,
makes 6 pairs of 4); a tie prefers nothing and is refused as such, so that leaving it out is a decision.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from dpo_opt.precompute.read.strict_json import FIX_ROW, escape, kind_of
from dpo_opt.schemas.errors import DataError

Values = dict[str, object]

PROMPT_KEYS = ("prompt", "instruction", "question", "context", "input", "query")
"""Keys that publishers use for the prompt; only ``prompt`` is read as one beside ``chosen``."""

_SCORE_KEYS = ("score", "overall_score", "rating", "reward")
_TEXT_KEYS = ("completion", "response", "text", "content")
_FIRST = {"a", "model_a", "response_a"}
_SECOND = {"b", "model_b", "response_b"}
_TIES = {"tie", "tie (bothbad)", "both", "neither"}
_GRADES = range(-3, 4)
_MOST_COMPLETIONS = 256  # of one prompt; they are up to 32,640 pairs


class Shape(NamedTuple):
    """A recognised form of row."""

    name: str
    keys: frozenset[str]
    """A row of this form has all of them."""
    convert: Callable[[Values, str], list[Values]]
    ranked: bool = False
    """One row may be any number of pairs."""


def find_shape(values: Values) -> Shape | None:
    """The published shape whose keys the row has; None where it has none of them."""
    return next((shape for shape in SHAPES if shape.keys <= values.keys()), None)


def _shp(values: Values, where: str) -> list[Values]:
    label = values["labels"]
    if type(label) is not int or label not in (0, 1):
        _refuse_label("labels", label, where, expected="1 (A is preferred) or 0 (B is)")
    return [
        _pair(
            values,
            prompt=_as_user(values["history"]),
            first=_as_assistant(values["human_ref_A"]),
            second=_as_assistant(values["human_ref_B"]),
            prefers_first=label == 1,
            source=values.get("source", values.get("domain")),
        )
    ]


def _labelled(values: Values, where: str) -> list[Values]:
    key = "preference" if "preference" in values else "winner"
    return [
        _pair(
            values,
            prompt=_prompt_of(values, where),
            first=values["response_a"],
            second=values["response_b"],
            prefers_first=_prefers_first(key, values[key], where),
        )
    ]


def _safety_labelled(values: Values, where: str) -> list[Values]:
    better = values["better_response_id"]
    if type(better) is not int or better not in (0, 1):
        _refuse_label("better_response_id", better, where, expected="0 or 1")
    return [
        _pair(
            values,
            prompt=_prompt_of(values, where),
            first=values["response_0"],
            second=values["response_1"],
            prefers_first=better == 0,
        )
    ]


def _graded(values: Values, where: str) -> list[Values]:
    grade = values["overall_preference"]
    if type(grade) is not int or grade not in _GRADES:
        _refuse_label("overall_preference", grade, where, expected="a whole number from -3 to 3")
    if grade == 0:
        _refuse_tie(where)
    prompt = _prompt_of(values, where)
    wrap = _as_assistant if isinstance(prompt, list) else _as_is
    return [
        _pair(
            values,
            prompt=prompt,
            first=wrap(values["response1"]),
            second=wrap(values["response2"]),
            prefers_first=grade < 0,
        )
    ]


def _conversations(values: Values, where: str) -> list[Values]:
    first = _prefers_first("winner", values["winner"], where)
    sides = (values["conversation_a"], values["conversation_b"])
    chosen, rejected = sides if first else reversed(sides)
    return [{**_kept(values), "chosen": chosen, "rejected": rejected}]


def _ranked(values: Values, where: str) -> list[Values]:
    key = "completions" if "completions" in values else "responses"
    completions = values[key]
    if not isinstance(completions, list) or len(completions) < 2:
        _refuse(f'"{key}" is not a list of at least two completions', where)
    if len(completions) > _MOST_COMPLETIONS:
        _refuse(f'"{key}" has {len(completions)} completions, and {_MOST_COMPLETIONS} is the most', where)
    goodness = _goodness(values, completions, key, where)
    texts = [_completion_text(c, f'completion {i} of "{key}"', where) for i, c in enumerate(completions, 1)]
    prompt = _prompt_of(values, where)
    order = sorted(range(len(texts)), key=lambda i: -goodness[i])
    pairs = [(i, j) for i, j in itertools.combinations(order, 2) if goodness[i] > goodness[j]]
    if not pairs:
        _refuse_tie(where)
    common = {**_kept(values), "prompt": prompt}
    return [{**common, "chosen": texts[i], "rejected": texts[j]} for i, j in pairs]


def _goodness(values: Values, completions: list[object], key: str, where: str) -> list[float]:
    """One number per completion, larger is better, from a list beside them or a key inside each."""
    for name in ("ranks", "scores", "rewards", "rank", "score"):
        beside = values.get(name)
        if isinstance(beside, list):
            return _numbers(beside, len(completions), name, where)
    for name in ("rank", *_SCORE_KEYS):
        inside = [c.get(name) for c in completions if isinstance(c, dict)]
        if len(inside) == len(completions) and None not in inside:
            return _numbers(inside, len(completions), name, where)
    _refuse(f'"{key}" has neither ranks nor scores', where)


def _numbers(found: list[object], count: int, name: str, where: str) -> list[float]:
    if len(found) != count:
        _refuse(f'"{name}" has {len(found)} values for {count} completions', where)
    numbers = []
    for value in found:
        if isinstance(value, bool) or not isinstance(value, int | float):
            _refuse(f'"{name}" holds {kind_of(value)} where a number is expected', where)
        if not -math.inf < value < math.inf:
            _refuse(f'"{name}" holds {value:g}, which ranks nothing', where)
        numbers.append(-value if name.startswith("rank") else value)
    return numbers


def _completion_text(completion: object, name: str, where: str) -> object:
    if not isinstance(completion, dict):
        return completion
    for key in _TEXT_KEYS:
        if key in completion:
            return completion[key]
    _refuse(f"{name} has none of the keys {', '.join(_TEXT_KEYS)}", where)


def _pair(
    values: Values,
    *,
    prompt: object,
    first: object,
    second: object,
    prefers_first: bool,
    source: object = None,
) -> Values:
    chosen, rejected = (first, second) if prefers_first else (second, first)
    pair = {**_kept(values), "prompt": prompt, "chosen": chosen, "rejected": rejected}
    return pair if source is None else {**pair, "source": source}


def _kept(values: Values) -> Values:
    """What any row may carry beside its texts."""
    return {key: values[key] for key in CARRIED_KEYS if key in values}


def _prompt_of(values: Values, where: str) -> object:
    for key in PROMPT_KEYS:
        if key in values:
            return values[key]
    _refuse('there is no "prompt"', where)


def _prefers_first(key: str, label: object, where: str) -> bool:
    text = label.strip().lower() if isinstance(label, str) else None
    if text in _TIES:
        _refuse_tie(where)
    if text not in _FIRST | _SECOND:
        _refuse_label(key, label, where, expected='"a", "b" or "tie"')
    return text in _FIRST


def _as_user(text: object) -> object:
    return [{"role": "user", "content": text}]


def _as_assistant(text: object) -> object:
    return [{"role": "assistant", "content": text}]


def _as_is(text: object) -> object:
    return text


def _refuse_label(key: str, label: object, where: str, *, expected: str) -> NoReturn:
    found = f'"{escape(label)}"' if isinstance(label, str | int | float) else kind_of(label)
    raise DataError(
        f'"{key}" is {found}, not {expected}',
        where=where,
        why="nothing else says which completion is preferred",
        fix=FIX_ROW,
        kind="label",
    )


def _refuse_tie(where: str) -> NoReturn:
    raise DataError(
        "no completion is preferred over another",
        where=where,
        why="DPO learns from preferences; a tie has none",
        fix="remove the row, or pass --on-bad-row skip",
        kind="tie",
    )


def _refuse(what: str, where: str) -> NoReturn:
    raise DataError(what, where=where, why="the pair cannot be made of this row", fix=FIX_ROW, kind="shape")


CARRIED_KEYS = ("source", "id", "weight", "margin", "tools", "chat_template_kwargs")
"""What a row may say beside prompt and completions."""

SHAPES = (
    Shape("SHP", frozenset({"history", "human_ref_A", "human_ref_B", "labels"}), _shp),
    Shape("labelled responses", frozenset({"response_a", "response_b", "preference"}), _labelled),
    Shape("labelled responses", frozenset({"response_a", "response_b", "winner"}), _labelled),
    Shape(
        "safety-labelled responses",
        frozenset({"response_0", "response_1", "better_response_id"}),
        _safety_labelled,
    ),
    Shape("graded responses", frozenset({"response1", "response2", "overall_preference"}), _graded),
    Shape("conversations", frozenset({"conversation_a", "conversation_b", "winner"}), _conversations),
    Shape("ranked completions", frozenset({"completions"}), _ranked, ranked=True),
    Shape("ranked completions", frozenset({"responses"}), _ranked, ranked=True),
)

READ_KEYS = frozenset(
    {
        "chosen",
        "rejected",
        "score_chosen",
        "score_rejected",
        "domain",
        "ranks",
        "scores",
        "rewards",
        "rank",
        "score",
    }
    | set(PROMPT_KEYS)
    | set(CARRIED_KEYS)
    | {key for shape in SHAPES for key in shape.keys}
)
"""Every key that some form reads; columns of other names are never loaded."""
