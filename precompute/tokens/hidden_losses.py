"""Whether a template writes each thing itself that ``faithful`` found in the text, or another has its words.

A call that a template drops is found all the same if the list of tools has its name, and the question its
argument. So is a tool if a call has its words, a short answer in a longer one, and the second of two equal
messages in the first. So the conversation is rendered again, with a word of its own in the place of each:

* Every word must be there, as often as its text is in the row, and in the order of the messages.
* A message must not be written as the user or the assistant would have written it, unless its place says who
  speaks: a system or developer at the start, and users and assistants in turns. Templates without headers
  write all roles alike. The result of a call may be written as the user's, as some models are trained on it.
* An empty message must leave a trace, unless it is a system's.

A template may write a call as the list of tools says: with its arguments in that order, or only if the tool
is there. So words that are lost of a call are looked for once more, with the words that the tools have; they
must be in the text as often as before, and once for each call.

Rows of one shape become the same words, and are rendered once.
"""

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, MutableMapping
from typing import NamedTuple

from dpo_opt.precompute.read.messages import FIRST_ROLES
from dpo_opt.precompute.read.strict_json import SKIP_ROW, escape
from dpo_opt.precompute.tokens.faithful import THOUGHT_KEYS, Part, lost, refused
from dpo_opt.precompute.tokens.tool_calls import has_calls
from dpo_opt.precompute.tokens.worded import (
    Thing,
    Worded,
    has_zeros,
    names_of_tools,
    worded,
    worded_documents,
    worded_tools,
)
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import Message

_SPEAKERS = {"human": "user", "model": "assistant", "gpt": "assistant"}
_MOST_KEPT = 1_000  # shapes; data may have as many as it has rows


class Loss(NamedTuple):
    """What a template does to conversations of a shape."""

    how: str
    """``left out``, ``order``, ``empty``, ``refused``, or the role as which it writes another.

    ``refused``: it takes only what the row says, or calls of tools that the row has.
    """
    message: int | None
    """Its index; None: it is a tool or a document."""
    thing: int = 0
    """Which thing of the message, of the tools or of the documents."""


Known = MutableMapping[str, Loss | None]
"""What is known of a template, by shape; and by its role and neighbours, of a message in its place."""


class Beside(NamedTuple):
    """What a row tells a template beside messages."""

    tools: list[object] | None
    documents: object
    settings: str
    """All other settings as text."""


Write = Callable[[list[Message], list[object] | None, object, bool], str]


def refuse_hidden_losses(
    parts: list[Part], *, beside: Beside, write: Write, known: Known, where: str
) -> None:
    """Refuse a row of which the template leaves out what only seems to be in the text.

    Args:
        parts: As ``refuse_losses`` takes them, which found everything.
        beside: The row's.
        write: Renders messages, tools and documents, opened for generation or not.
        known: Of this template; what is found is added.
        where: For the message of an error.

    Raises:
        DataError: Something is not written.
    """
    prompt, *completions = parts
    tools, of_tools = (None, []) if beside.tools is None else worded_tools(beside.tools)
    documents, of_documents = worded_documents(beside.documents)
    # The whole conversation begins with the prompt's own text, so that the prompt is looked at in it.
    messages = [part.messages for part in completions] or [[]]
    kinds = (False, True) if any(has_zeros(part.messages) for part in parts) else (False,)
    shapes = {zeros: worded(prompt.messages, messages, zeros=zeros) for zeros in kinds}
    opened = not completions
    shown = repr((opened, tools, documents, beside.settings))
    for zeros, (side, part) in itertools.product(shapes, enumerate(completions or parts)):
        words = shapes[zeros][side]
        # Of the same messages, a thought may be left out in a prompt and not in a completion.
        key = repr((words.messages, _words_of(words))) + shown
        if key not in known:
            found = _Template(
                lambda messages: write(messages, tools, documents, opened),
                known=known,
                others=[*of_tools, *of_documents],
                settings=beside.settings,
            ).loss(words, answered=not opened)
            if len(known) >= _MOST_KEPT:
                known.clear()
            known[key] = found
        loss = known[key]
        if loss is not None and tools and has_calls(words.messages) and _may_be_of_words(loss):
            alike_tools, alike_things = worded_tools(beside.tools or [], alike=True)
            alike = worded(prompt.messages, messages, named=names_of_tools(alike_things), zeros=zeros)[side]

            def write_alike(given: list[Message], *, tools: list[object] = alike_tools) -> str:
                return write(given, tools, documents, opened)

            key = repr((alike.messages, alike_tools, _words_of(alike))) + shown
            if key not in known:
                before = _counts(words, of_tools, alike_things, lambda m: write(m, tools, documents, opened))
                found = _Template(
                    write_alike, known=known, others=[*alike_things, *of_documents], settings=beside.settings
                ).loss(alike, answered=not opened, before=before)
                known[key] = loss if found is not None and found.how == "refused" else found
            loss = known[key]
        if loss is not None and loss.how != "refused":
            raise _error(loss, prompt, part, words, of_tools, of_documents, where)


def _words_of(words: Worded) -> list[list[str]]:
    return [[thing.word for thing in things] for things in words.things]


def _counts(
    words: Worded, of_tools: list[Thing], alike: list[Thing], write: Callable[[list[Message]], str]
) -> Counter[str]:
    """How often a template writes each word of the tools where no call has it; at least once for each."""
    text = ""
    without = [{key: m[key] for key in m.keys() - {"tool_calls"}} for m in words.messages]
    for messages in (words.messages, without):
        with contextlib.suppress(DataError):
            text = text or write(messages)
    found: Counter[str] = Counter()
    for own, shared in zip(of_tools, alike, strict=True):
        found[shared.word] += max(1, text.count(own.word))
    return found


def _may_be_of_words(loss: Loss) -> bool:
    """Whether what is lost may be only the words that a call does not share with the tools."""
    return loss.how == "refused" or (loss.how == "left out" and loss.message is not None)


class _Template:
    def __init__(
        self,
        write: Callable[[list[Message]], str],
        *,
        known: Known,
        others: list[Thing],
        settings: str,
    ) -> None:
        self._write, self._known, self._others, self._settings = write, known, others, settings

    def loss(self, words: Worded, *, answered: bool, before: Counter[str] | None = None) -> Loss | None:
        """What is lost of the messages, the last one of them an answer or not, and of others.

        Args:
            words: The messages.
            answered: Whether the last one is an answer.
            before: Words that others have too, and how often they stand in the text without a message's.
        """
        try:
            text = self._write(words.messages)
        except DataError:
            return Loss("refused", None)
        for i, thing in enumerate(self._others):
            if thing.word not in text:
                return Loss("left out", None, i)
        found = (_too_few(words, text, before) if before else None) or self._first_unwritten(words, text)
        if found is not None:
            return found
        # An answer without a token is a reason of its own to leave the pair out.
        answer = len(words.messages) - 1 if answered else None
        for i, message in enumerate(words.messages):
            without = [*words.messages[:i], *words.messages[i + 1 :]]
            if _is_empty(message) and i != answer and self._renders(without, text):
                return Loss("empty", i)
            other = self._other_role(words.messages, i, text)
            if other is not None:
                return Loss(other, i)
        return None

    def _first_unwritten(self, words: Worded, text: str) -> Loss | None:
        wanted = Counter(thing.word for things in words.things for thing in things)
        reached = run = 0
        first: dict[str, int] = {}
        for i, message in enumerate(words.messages):
            role = message["role"]
            # The results of several calls stand in any order: their ids say which is whose.
            if role != "tool" or i == 0 or words.messages[i - 1]["role"] != "tool":
                run = reached
            # A system's may stand anywhere, and the second of two equal ones behind the first.
            ends = first if role in FIRST_ROLES else {}
            for number, thing in enumerate(words.things[i]):
                start = ends.get(thing.word, 0 if role in FIRST_ROLES else run)
                at = text.find(thing.word, start)
                if at < 0:
                    enough = text.count(thing.word) >= wanted[thing.word]
                    return Loss("order" if enough else "left out", i, number)
                ends[thing.word] = at + len(thing.word)
            if role not in FIRST_ROLES:
                reached = max(reached, *ends.values(), 0)
        for i, things in reversed(list(enumerate(words.things))):
            for number, thing in enumerate(things):
                if text.count(thing.word) < wanted[thing.word]:
                    return Loss("left out", i, number)
        return None

    def _other_role(self, messages: list[Message], number: int, text: str) -> str | None:
        """The role of which the template writes the message, too; None where its place says its own."""
        role, before, after = (
            _speaker(messages[i]) if 0 <= i < len(messages) else None
            for i in (number, number - 1, number + 1)
        )
        if role in FIRST_ROLES and number == 0:
            return None
        if role == ("assistant" if before in ("user", "tool") else "user"):
            return None
        answers = role == "tool" and (before == "tool" or "tool_calls" in messages[max(0, number - 1)])
        others = [other for other in ("assistant", "user") if other != role]
        others = ["assistant"] if answers else others
        message = messages[number]
        key = repr((before, role, after, others, sorted(message), _is_empty(message), self._settings))
        if key not in self._known:
            before_it, after_it = messages[:number], messages[number + 1 :]
            same = (
                other
                for other in others
                if self._renders([*before_it, {**message, "role": other}, *after_it], text)
            )
            written_as = next(same, None)
            self._known[key] = None if written_as is None else Loss(written_as, None)
        found = self._known[key]
        return None if found is None else found.how

    def _renders(self, messages: list[Message], text: str) -> bool:
        """Whether the messages become the text, too."""
        try:
            return self._write(messages) == text
        except DataError:
            return False


def _too_few(words: Worded, text: str, before: Counter[str]) -> Loss | None:
    """The first thing with a word that stands in the text less often than before and in the messages."""
    wanted = before + Counter(thing.word for things in words.things for thing in things)
    for i, things in enumerate(words.things):
        for number, thing in enumerate(things):
            if thing.word in before and text.count(thing.word) < wanted[thing.word]:
                return Loss("left out", i, number)
    return None


def _speaker(message: Message) -> str:
    role = str(message["role"])
    return _SPEAKERS.get(role, role)


def _is_empty(message: Message) -> bool:
    return (
        message["role"] not in FIRST_ROLES
        and not str(message["content"]).strip()
        and not message.get("tool_calls")
        and not any(str(message.get(key, "")).strip() for key in THOUGHT_KEYS)
    )


def _error(
    loss: Loss,
    prompt: Part,
    part: Part,
    words: Worded,
    of_tools: list[Thing],
    of_documents: list[Thing],
    where: str,
) -> DataError:
    if loss.message is None:
        thing = [*of_tools, *of_documents][loss.thing]
        place = '"tools"' if loss.thing < len(of_tools) else '"documents"'
        return lost(f"{thing.name} in {place}", thing.value, where)
    number = loss.message
    if number < len(prompt.messages):
        part = prompt
    else:
        number -= len(prompt.messages)
    place = f'message {number + 1} of "{part.name}"'
    role = escape(str(part.messages[number]["role"]))
    if loss.how == "left out":
        thing = words.things[loss.message][loss.thing]
        return lost(f"{thing.name} {place}", thing.value, where)
    if loss.how == "order":
        return refused(f'writes {place} (role "{role}") before what precedes it in the row', where)
    if loss.how == "empty":
        fix = f"{SKIP_ROW}; or take the empty message out of the row"
        return refused(f'writes nothing for {place} (role "{role}"), which is empty', where, fix)
    fix = f"{SKIP_ROW}; or use a template that writes the role: `dpo-opt preview DATA --model M` shows it"
    what = f'writes {place}, of the role "{role}", just as one of the role "{loss.how}"'
    return refused(what, where, fix)
