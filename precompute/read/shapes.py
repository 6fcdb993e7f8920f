"""Published shapes of preference data, rewritten as prompt, chosen and rejected.

Recognised by their keys, so that a row is never taken for something else because of what it says:

======================  ======================================================================  =============
form                    keys                                                                    found in
======================  ======================================================================  =============
pairs                   chosen, rejected, optionally prompt                                     most
SHP                     history, human_ref_A, human_ref_B, labels (1: A is preferred)           SHP, SHP-2
labelled responses      prompt, response_a, response_b, preference or winner (a, b or tie)      judge outputs
safety-labelled         prompt, response_0, response_1, better_response_id                      SafeRLHF
graded responses        context or prompt, response1, response2, overall_preference (-3 to 3)   HelpSteer3
graded responses        prompt, response_1, response_2, preference_strength (-3 to 3)           HelpSteer2
conversations           conversation_a, conversation_b, winner (model_a, model_b, tie)          arena votes
arena battles           prompt, response_a, response_b, winner_model_a, ..._b, winner_tie       LMSYS 55k
ranked completions      prompt, completions, responses or answers, with ranks (1 is best, or    UltraFeed-
                        0) or scores                                                            back, NeMo-RL
Vertex AI preferences   contents, completions with score                                        Vertex AI
OpenAI preferences      input.messages, preferred_output, non_preferred_output                  OpenAI
ShareGPT ranking        conversations or messages; chosen and rejected, one message each        LLaMA-Factory
conversation, answers   conversations or messages; chosen and rejected, texts or messages       most, renamed
ms-swift                messages, rejected_response or rejected_messages                        ms-swift
system and question     system, question, chosen, rejected                                      Orca pairs
Alpaca preferences      instruction, input, system, history, chosen, rejected                   LLaMA-Factory
question with image     question, chosen, rejected, image (empty)                               RLAIF-V
======================  ======================================================================  =============

Rows of one completion and a label are those of ``unpaired_shapes``.
A row that is a pair already, with ``chosen`` and ``rejected``, is only of a form that has both keys too.
"""

from collections.abc import Callable, Set
from typing import NamedTuple

from dpo_opt.precompute.read.framework_shapes import FRAMEWORK_SHAPES
from dpo_opt.precompute.read.ranked_shapes import RANKED_SHAPES
from dpo_opt.precompute.read.shape_parts import (
    AROUND_KEYS,
    CARRIED_KEYS,
    CONVERSATION_KEYS,
    PAIR_KEYS,
    PROMPT_KEYS,
    RATINGS,
    Shape,
    Values,
    agreed,
    kept,
    prompt_of,
    refuse,
    refuse_label,
    refuse_tie,
    said,
)
from dpo_opt.precompute.read.strict_json import parse_json
from dpo_opt.precompute.read.unpaired_shapes import UNPAIRED_SHAPES

_FIRST = {"a", "model_a", "response_a"}
_SECOND = {"b", "model_b", "response_b"}
_TIES = {"tie", "tie (bothbad)", "tie (both bad)", "bothbad", "both_bad", "both bad", "both", "neither"}
_GRADES = range(-3, 4)
_VOTES = ("winner_model_a", "winner_model_b", "winner_tie")


def find_shape(values: Values) -> Shape | None:
    """The published shape that a row has; None if there is no such shape."""
    shapes = SHAPES
    if "chosen" in values and "rejected" in values:
        # A pair with its prompt is of no other form; most rows are that, and are not compared with each.
        shapes = () if "prompt" in values else _PAIR_SHAPES
    return next((shape for shape in shapes if shape.is_form_of(values)), None)


def keys_to_read(names: Set[str], objects: Set[str]) -> frozenset[str]:
    """Which columns of a table some form reads; the others are never loaded.

    Args:
        names: Its columns, without those that ``--column`` names.
        objects: Those of them that hold objects.
    """
    found = [
        shape
        for shape in SHAPES
        if shape.keys <= names and shape.objects <= objects
        # Of a form known by its objects too, a key that it lacks may be null in every row.
        if shape.objects or shape.absent.isdisjoint(names)
    ]
    return _ALWAYS_READ.union(*(shape.keys | shape.also for shape in found))


def has_form(names: Set[str]) -> bool:
    """Whether a table with these columns may hold pairs, or rows of a published form."""
    return names >= PAIR_KEYS or any(s.keys <= names and s.absent.isdisjoint(names) for s in SHAPES)


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
    other_label: str | None = None
    """Another key that labels such rows; one of them may be null, and both may say the same."""

    def convert(self, values: Values, where: str) -> list[Values]:
        """The row's pair."""
        labels = {key: values.get(key) for key in (self.label, self.other_label) if key is not None}
        given = {key: label for key, label in labels.items() if label is not None} or {self.label: None}
        found = {key: self.prefers_first(key, label, where) for key, label in given.items()}
        prefers_first = agreed(found, where)
        prompt = [said("user", values[self.user_text])] if self.user_text else prompt_of(values, where)
        sides = [values[self.first], values[self.second]]
        if self.assistant_texts and isinstance(prompt, list):
            sides = [[said("assistant", side)] for side in sides]
        chosen, rejected = sides if prefers_first else reversed(sides)
        pair = {**kept(values), "prompt": prompt, "chosen": chosen, "rejected": rejected}
        source = values.get(self.source) if self.source and "source" not in values else None
        return [pair if source is None else {**pair, "source": source}]

    def shape(self, name: str) -> Shape:
        """The form of the rows that have these keys."""
        keys = (self.first, self.second, self.label, self.user_text)
        return Shape(name, frozenset(key for key in keys if key is not None), self.convert)


def _conversations(values: Values, where: str) -> list[Values]:
    first = _by_letter("winner", values["winner"], where)
    sides = [_uncounted(values[key]) for key in ("conversation_a", "conversation_b")]
    chosen, rejected = sides if first else reversed(sides)
    return [{**kept(values), "chosen": chosen, "rejected": rejected}]


def _uncounted(conversation: object) -> object:
    """A conversation without the numbers of tokens that the arena's messages say (its 100k votes of 2025)."""
    if not isinstance(conversation, list):
        return conversation
    return [
        {key: value for key, value in turn.items() if key != "num_tokens" or isinstance(value, str)}
        if isinstance(turn, dict)
        else turn
        for turn in conversation
    ]


def _arena(values: Values, where: str) -> list[Values]:
    """A battle whose cells hold one text per turn."""
    votes = [_whole(values[key]) for key in _VOTES]
    for key, vote in zip(_VOTES, votes, strict=True):
        if type(vote) is not int or vote not in (0, 1):
            refuse_label(key, vote, where, expected="0 or 1")
    if votes == [0, 0, 1]:
        refuse_tie(where)
    if votes not in ([1, 0, 0], [0, 1, 0]):
        refuse_label("winner_model_a", votes[0], where, expected="one vote among its three columns")
    prompts, *answers = (_cell(values[key], key, where) for key in ("prompt", "response_a", "response_b"))
    if not len(prompts) == len(answers[0]) == len(answers[1]) > 0:
        refuse('"prompt", "response_a" and "response_b" have different numbers of turns, or none', where)
    sides = [
        [
            m
            for ask, text in zip(prompts, side, strict=True)
            for m in (said("user", ask), said("assistant", text))
        ]
        for side in answers
    ]
    chosen, rejected = sides if votes[0] else reversed(sides)
    return [{**kept(values), "chosen": chosen, "rejected": rejected}]


def _cell(value: object, key: str, where: str) -> list[object]:
    """The list that a cell holds, as a list or as its JSON text."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, list):
        refuse(f'"{key}" is no list of turns, nor the JSON text of one', where)
    return value


def _by_letter(key: str, label: object, where: str) -> bool:
    text = label.strip().lower() if isinstance(label, str) else None
    if text in _TIES:
        refuse_tie(where)
    if text not in _FIRST | _SECOND:
        refuse_label(key, label, where, expected='"a", "b" or "tie"')
    return text in _FIRST


def _whole(label: object) -> object:
    """A whole number that a table with empty cells holds as a float, as a whole number."""
    return int(label) if isinstance(label, float) and label.is_integer() else label


def _first_is_1(key: str, label: object, where: str) -> bool:
    label = _whole(label)
    if type(label) is not int or label not in (0, 1):
        refuse_label(key, label, where, expected="1 (A is preferred) or 0 (B is)")
    return label == 1


def _first_is_0(key: str, label: object, where: str) -> bool:
    label = _whole(label)
    if type(label) is not int or label not in (0, 1):
        refuse_label(key, label, where, expected="0 or 1")
    return label == 0


def _by_grade(key: str, label: object, where: str) -> bool:
    label = _whole(label)
    if type(label) is not int or label not in _GRADES:
        refuse_label(key, label, where, expected="a whole number from -3 to 3")
    if label == 0:
        refuse_tie(where)
    return label < 0


_LABELLED_SHAPES = (
    _Comparison(
        "human_ref_A",
        "human_ref_B",
        "labels",
        _first_is_1,
        user_text="history",
        assistant_texts=True,
        source="domain",
    ).shape("SHP"),
    _Comparison("response_a", "response_b", "preference", _by_letter, other_label="winner").shape(
        "labelled responses"
    ),
    _Comparison("response_a", "response_b", "winner", _by_letter).shape("labelled responses"),
    _Comparison("response_0", "response_1", "better_response_id", _first_is_0).shape(
        "safety-labelled responses"
    ),
    _Comparison("response1", "response2", "overall_preference", _by_grade, assistant_texts=True).shape(
        "graded responses"
    ),
    Shape("conversations", frozenset({"conversation_a", "conversation_b", "winner"}), _conversations),
)

SHAPES = (
    *_LABELLED_SHAPES,
    *RANKED_SHAPES,
    _Comparison("response_1", "response_2", "preference_strength", _by_grade, assistant_texts=True).shape(
        "graded responses"
    ),
    Shape("arena battles", frozenset({"prompt", "response_a", "response_b", *_VOTES}), _arena),
    *FRAMEWORK_SHAPES,
    *UNPAIRED_SHAPES,
)
"""A row is of the first of these forms that it has the keys of."""

_PAIR_SHAPES = tuple(shape for shape in SHAPES if shape.keys >= PAIR_KEYS)

# The keys of other forms are loaded where a table has all keys of the form.
_ALWAYS_READ = frozenset(
    {
        *("chosen", "rejected", "domain"),
        *RATINGS.keys(),
        *RATINGS.values(),
        *("ranks", "scores", "rewards", "rank", "score", "completions", "responses"),
        *PROMPT_KEYS,
        *CARRIED_KEYS,
        *(AROUND_KEYS - {*CONVERSATION_KEYS}),
        *(key for shape in _LABELLED_SHAPES for key in shape.keys),
    }
)
