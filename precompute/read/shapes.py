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
"""Keys that publishers use for the prompt. In a row with ``chosen`` only ``prompt`` is one."""

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
    """The published shape whose keys the row has; None if there is no such shape."""
    return next((shape for shape in SHAPES if shape.keys <= values.keys()), None)


class _Comparison(NamedTuple):
    """Where a row has two completions, and the label that prefers one of them."""

    first: str
    """Here and below, a key of the row."""
    second: str
    label: str
    prefers_first: Callable[[str, object, str], bool]
    """Given the label's key, the label, and where the row is. Refuses other labels, and ties."""
    user_text: str | None = None
    """The prompt, as the text of a user's message. None: the prompt is whatever ``PROMPT_KEYS`` names."""
    assistant_texts: bool = False
    """The completions are an assistant's texts where the prompt is a list of messages."""
    source: str | None = None
    """The pair's source, in a row without the key ``source``."""

    def convert(self, values: Values, where: str) -> list[Values]:
        """The row's pair."""
        prefers_first = self.prefers_first(self.label, values[self.label], where)
        prompt = _as_user(values[self.user_text]) if self.user_text else _prompt_of(values, where)
        sides = [values[self.first], values[self.second]]
        if self.assistant_texts and isinstance(prompt, list):
            sides = [_as_assistant(side) for side in sides]
        chosen, rejected = sides if prefers_first else reversed(sides)
        pair = {**_kept(values), "prompt": prompt, "chosen": chosen, "rejected": rejected}
        source = values.get(self.source) if self.source and "source" not in values else None
        return [pair if source is None else {**pair, "source": source}]

    def shape(self, name: str) -> "Shape":
        """The form of the rows that have these keys."""
        keys = (self.first, self.second, self.label, self.user_text)
        return Shape(name, frozenset(key for key in keys if key is not None), self.convert)


def _conversations(values: Values, where: str) -> list[Values]:
    first = _by_letter("winner", values["winner"], where)
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
    """One number per completion, larger is better, from a list of the row or a key of each completion."""
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


def _kept(values: Values) -> Values:
    """Those values of a row that are carried along with its texts."""
    return {key: values[key] for key in CARRIED_KEYS if key in values}


def _prompt_of(values: Values, where: str) -> object:
    for key in PROMPT_KEYS:
        if key in values:
            return values[key]
    _refuse('there is no "prompt"', where)


def _by_letter(key: str, label: object, where: str) -> bool:
    text = label.strip().lower() if isinstance(label, str) else None
    if text in _TIES:
        _refuse_tie(where)
    if text not in _FIRST | _SECOND:
        _refuse_label(key, label, where, expected='"a", "b" or "tie"')
    return text in _FIRST


def _first_is_1(key: str, label: object, where: str) -> bool:
    if type(label) is not int or label not in (0, 1):
        _refuse_label(key, label, where, expected="1 (A is preferred) or 0 (B is)")
    return label == 1


def _first_is_0(key: str, label: object, where: str) -> bool:
    if type(label) is not int or label not in (0, 1):
        _refuse_label(key, label, where, expected="0 or 1")
    return label == 0


def _by_grade(key: str, label: object, where: str) -> bool:
    if type(label) is not int or label not in _GRADES:
        _refuse_label(key, label, where, expected="a whole number from -3 to 3")
    if label == 0:
        _refuse_tie(where)
    return label < 0


def _as_user(text: object) -> object:
    return [{"role": "user", "content": text}]


def _as_assistant(text: object) -> object:
    return [{"role": "assistant", "content": text}]


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
"""What a row may have in addition to prompt and completions."""

SHAPES = (
    _Comparison(
        "human_ref_A",
        "human_ref_B",
        "labels",
        _first_is_1,
        user_text="history",
        assistant_texts=True,
        source="domain",
    ).shape("SHP"),
    _Comparison("response_a", "response_b", "preference", _by_letter).shape("labelled responses"),
    _Comparison("response_a", "response_b", "winner", _by_letter).shape("labelled responses"),
    _Comparison("response_0", "response_1", "better_response_id", _first_is_0).shape(
        "safety-labelled responses"
    ),
    _Comparison("response1", "response2", "overall_preference", _by_grade, assistant_texts=True).shape(
        "graded responses"
    ),
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
