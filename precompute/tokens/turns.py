"""Which of a completion's tokens count: those of the assistant's turns that are trained on.

A completion of several messages is a conversation. What users, systems and tools say in it is context, and so
is the header of a turn: what the template writes before an assistant's turn to ask for one. A completion of
one message is the assistant's as a whole, as the ids divide it from the prompt, and needs no mask; rows in
which it is a tool's are refused when they are read.

Where the turn of message ``n`` stands is measured by rendering:

* A template with ``{% generation %}`` says it itself, to transformers.
* Else it begins where ``messages[:n]``, opened for generation, end, and ends where ``messages[:n + 1]`` end.
  Both must be the beginning of the whole conversation. Three habits of real templates are known: to open a
  turn for generation as no finished one is (with a thought); to write an empty thought into the last turn
  alone; to end the last turn, or the conversation, as no other.
* Every border must be one between two tokens.
* No turn may reach to the next message's words over a header, nor hold them.

Otherwise the row is refused: nobody could say whose a token is.
"""

import re
from itertools import takewhile
from typing import Any, NamedTuple, assert_never

import numpy as np

from dpo_opt.precompute.config import TrainOn
from dpo_opt.precompute.read.messages import OTHER_ROLES
from dpo_opt.precompute.read.strict_json import SKIP_ROW
from dpo_opt.precompute.tokens.long_texts import LONGEST_PIECE
from dpo_opt.precompute.tokens.templates import Renderer
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import IdArray, MaskArray, Message

_ASSISTANTS = {"assistant", "model", "gpt", "bot", "chatbot", "ai"}
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OTHER_WORDS = "§"
_PROBES = ("wordone", "wordtwo")
_MARKS = "{% generation %} in the chat template marks"
_SHOWN = 40  # characters in a message


class Span(NamedTuple):
    """Characters of a rendered conversation that count."""

    start: int
    stop: int
    opened: str | None = None
    """The turn begins where the ids of this text and those of the conversation part, not at ``start``."""
    exact: bool = True
    """Whether its ends must be ends of tokens; a template's own word counts every token that it touches."""


def counted_turns(
    chosen: list[Message], rejected: list[Message], train_on: TrainOn, where: str
) -> tuple[list[int], list[int]]:
    """Which messages of each completion count, by index.

    ``first-difference``: the assistant's turns of both sides are compared in order, first with first; the
    first two that differ count, and no other. A side that has none there has nothing that counts.

    Raises:
        DataError: A completion of several messages has a role that is neither the assistant's nor another's.
    """
    turns = (_assistants(chosen, where), _assistants(rejected, where))
    match train_on:
        case "all":
            return turns
        case "last":
            return turns[0][-1:], turns[1][-1:]
        case "first-difference":
            for number in range(max(map(len, turns))):
                ours, theirs = (of_side[number : number + 1] for of_side in turns)
                if [chosen[i] for i in ours] != [rejected[i] for i in theirs]:
                    return ours, theirs
            return [], []
        case _:
            assert_never(train_on)


def _assistants(completion: list[Message], where: str) -> list[int]:
    if len(completion) == 1:
        return [0]
    roles = [str(message["role"]) for message in completion]
    for role in roles:
        if role not in _ASSISTANTS | OTHER_ROLES:
            raise _refused(f'whether a turn of the role "{role}" is the assistant\'s is not known', where)
    return [i for i, role in enumerate(roles) if role in _ASSISTANTS]


class Located(NamedTuple):
    """A conversation whose turns are to be found."""

    messages: list[Message]
    """Prompt and completion."""
    prompt: int
    """How many of them are the prompt."""
    text: str
    """What the template renders."""
    where: str
    render: Renderer


def spans_of(side: Located, turns: list[int]) -> list[Span] | None:
    """Where the turns stand that count; None where all of the completion counts.

    Args:
        side: Prompt and completion.
        turns: Indices of messages of the completion, ascending.

    Raises:
        DataError: That cannot be told.
    """
    if turns == [0] and len(side.messages) == side.prompt + 1:
        return None
    if not turns:
        return []
    try:
        if _GENERATION.search(side.render.template):
            return _marked_spans(side, turns)
        spans = [_span(side, side.prompt + turn, first=turn == 0) for turn in turns]
        for turn, span in zip(turns, spans, strict=True):
            _refuse_next_header(side, side.prompt + turn, span.stop)
        return spans
    except DataError as error:
        if error.kind != "template":
            raise
        raise _refused(f"of a part of the conversation alone, {error.what}", side.where) from error


def _marked_spans(side: Located, turns: list[int]) -> list[Span]:
    """What the template itself says is generated."""
    marked = side.render.marked
    text, spans = marked(side.messages)
    parts: dict[int, list[str]] = {0: []}

    def alone(number: int) -> list[str]:
        """What is marked of the first messages by themselves."""
        if number not in parts:
            part, found = marked(side.messages[:number])
            parts[number] = [part[start:stop] for start, stop in found]
        return parts[number]

    def before(number: int) -> int:
        return len(alone(number))

    last = max(i for i, message in enumerate(side.messages) if str(message["role"]) in _ASSISTANTS)
    found: list[tuple[int, int]] = []
    for turn in turns:
        number = side.prompt + turn
        own = spans[before(number) : before(number + 1)]
        # A template that marks the last turn alone marks one in every part of the conversation.
        said = str(side.messages[number]["content"]).strip()
        its_own = said in "".join(text[start:stop] for start, stop in own) and before(last) < before(last + 1)
        if text != side.text or not own or not its_own:
            raise _refused("{% generation %} in the chat template marks no part of some turn", side.where)
        in_all = "".join(text[start:stop] for start, stop in own)
        by_itself = "".join(alone(number + 1)[before(number) :])
        more = in_all[len(by_itself) :].strip()
        if in_all.startswith(by_itself) and more:
            raise _refused(f"{_MARKS} {more[:_SHOWN]!r} behind a turn, where more follows", side.where)
        _refuse_next_header(side, number, own[-1][1])
        found += own
    _refuse_words_of_others(side, found)
    return [Span(start, stop, exact=False) for start, stop in found]


def _refuse_words_of_others(side: Located, spans: list[tuple[int, int]]) -> None:
    """Refuse spans that hold what others say; the answers may have the same words, so others are tried."""
    said = "".join(side.text[start:stop] for start, stop in spans)
    others = {
        i: f"{_PROBES[0]}{i}x"
        for i, message in enumerate(side.messages)
        if str(message["role"]) not in _ASSISTANTS
        and (content := str(message["content"]).strip())
        and content in said
    }
    if not others:
        return
    worded = [{**m, "content": others[i]} if i in others else m for i, m in enumerate(side.messages)]
    try:
        text, marked = side.render.marked(worded)
    except DataError:
        return  # it takes only what the row says
    for i, word in others.items():
        if any(word in text[start:stop] for start, stop in marked):
            role = str(side.messages[i]["role"])
            raise _refused(f'{_MARKS} the words of message {i + 1}, of the role "{role}"', side.where)


def _refuse_next_header(side: Located, number: int, stop: int) -> None:
    """Refuse a turn that reaches to the user's next words, where the user's first words have a header."""
    first, following = side.messages[0], side.messages[number + 1 : number + 2]
    if first["role"] != "user" or not following or following[0]["role"] != "user":
        return
    said = str(following[0]["content"]).strip()
    if not said or not side.text[stop:].lstrip().startswith(said):
        return
    before = side.text.partition(str(first["content"]).strip())[0]
    header = before[len(before) - _common_length(before[::-1], side.text[:stop][::-1]) :].strip()
    if header:
        raise _refused(
            f"the chat template writes {header!r}, the next user's header, into the turn", side.where
        )


def _span(side: Located, number: int, *, first: bool) -> Span:
    """Where the turn of message ``number`` stands."""
    text, messages = side.text, side.messages
    opened, alone, done = side.render([messages[:number], messages[:number], messages[: number + 1]])
    if first:
        # Where the prompt ends is told by the ids of both sides.
        start, opened_otherwise = 0, None
    elif text.startswith(opened):
        start, opened_otherwise = len(opened), None
    elif text.startswith(alone):
        start, opened_otherwise = len(alone), opened
    else:
        raise _rewritten(side, number, opened)
    if number == len(messages) - 1:
        return Span(start, len(text), opened_otherwise)
    if text.startswith(done) and len(done) > start:
        return Span(start, len(done), opened_otherwise)
    left_out = _left_out_later(side, number, alone, done)
    stop = _end_before_another(side, number) if left_out is None else len(done) - left_out
    if stop is None or stop <= start:
        raise _rewritten(side, number, done)
    return Span(start, stop, opened_otherwise)


def _left_out_later(side: Located, number: int, alone: str, done: str) -> int | None:
    """How many characters stand in the turn only while it is the last one; None where that is not all."""
    if not (side.text.startswith(alone) and done.startswith(alone)):
        return None
    other: Message = {"role": side.messages[number]["role"], "content": _OTHER_WORDS}
    *_, otherwise = side.render([side.messages[:number], [*side.messages[:number], other]])
    turn, whole = done[len(alone) :], side.text[len(alone) :]
    # What the template writes before any words.
    fixed = _common_length(turn, otherwise[len(alone) :])
    common = _common_length(turn, whole)
    for size in range(1, fixed + 1):
        begin = min(common, fixed - size)
        if whole.startswith(turn[begin + size :], begin):
            return size
    return None


def _end_before_another(side: Located, number: int) -> int | None:
    """Where a turn ends that ends otherwise while it is the last one; None where that cannot be told.

    Two messages of a user are put behind it. What follows the words of the first, whatever comes next (the
    end, a turn opened for generation, the second one), ends that message. What then stands before the words
    of the second one is a header, and the turn ends where the same header begins before the first.
    """
    begun = side.messages[: number + 1]
    first: Message = {"role": "user", "content": _PROBES[0]}
    second: Message = {"role": "user", "content": _PROBES[1]}
    try:
        opened, last = side.render([[*begun, first], [*begun, first]])
        (both,) = side.render([[*begun, first, second]], opens_first=False)
    except DataError:
        return None
    before, _, _ = last.partition(_PROBES[0])
    if any(text.count(_PROBES[0]) != 1 or not text.startswith(before) for text in (opened, last, both)):
        return None
    skipped = len(before) + len(_PROBES[0])
    follows = [text[skipped:] for text in (opened, last, both)]
    end = min(_common_length(follows[2], follows[0]), _common_length(follows[2], follows[1]))
    for token in side.render.added_tokens:
        # Two tokens that begin with the same letters are not the same.
        places = (text.find(token, max(0, end - len(token) + 1), end - 1 + len(token)) for text in follows)
        end = min((place for place in places if place >= 0), default=end)
    header = follows[2][end:].partition(_PROBES[1])[0]
    whole = before.removesuffix(header)
    return len(whole) if header and whole != before and side.text.startswith(whole) else None


def _common_length(a: str, b: str) -> int:
    return sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(a, b, strict=False)))


def counting_tokens(text: str, ids: IdArray, spans: list[Span], engine: Any, where: str) -> MaskArray:
    """Which tokens of a rendered conversation count.

    Args:
        text: The conversation.
        ids: (L,) its ids.
        spans: What counts of it.
        engine: A fast tokenizer's backend without a postprocessor, which might move offsets.
        where: For the message of an error.

    Returns:
        (L,) true for the tokens that count.

    Raises:
        DataError: A token stands on both sides of a border.
    """
    if len(text) > LONGEST_PIECE:
        raise _refused(f"a conversation of more than {LONGEST_PIECE:,} characters is not searched", where)
    encoding = engine.encode(text, add_special_tokens=False)
    if not np.array_equal(np.array(encoding.ids, dtype=np.int32), ids):
        raise _refused("the tokenizer gives other ids each time", where)
    starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
    # A token of no characters stands where it begins.
    ends = np.maximum(ends, starts + 1)
    counts = np.zeros(len(ids), dtype=np.bool_)
    for span in spans:
        inside = (ends > span.start) & (starts < span.stop)
        for border in (span.start, span.stop) if span.exact else ():
            across = np.flatnonzero((starts < border) & (ends > border))
            if len(across):
                token = text[starts[across[0]] : ends[across[0]]]
                raise _refused(f"the token {token!r} belongs to two turns", where)
        if span.opened is not None:
            before = np.array(engine.encode(span.opened, add_special_tokens=False).ids, dtype=np.int32)
            shortest = min(len(before), len(ids))
            differs = before[:shortest] != ids[:shortest]
            inside[: int(differs.argmax()) if differs.any() else shortest] = False
        counts |= inside
    return counts


def _rewritten(side: Located, number: int, part: str) -> DataError:
    at = _common_length(part, side.text)
    alone, followed = (repr(text[max(0, at - 20) : at + 30]) for text in (part, side.text))
    return _refused(
        "the chat template renders the conversation's beginning differently when more follows: up to message "
        f"{number + 1} it is {alone}, in the whole {followed}",
        side.where,
    )


def _refused(what: str, where: str) -> DataError:
    return DataError(
        f"the assistant's turns inside a completion cannot be told from the others: {what}",
        where=where,
        why="what users and tools say would be trained on as if the model had said it",
        fix=f"cut the conversations after the first answer that differs; or {SKIP_ROW}",
        kind="turns",
    )
