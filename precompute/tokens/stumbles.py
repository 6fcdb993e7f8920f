"""Which message a chat template stumbled over, and what it would take instead: found by rendering."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from dpo_opt.precompute.read.strict_json import SKIP_ROW, escape
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import Message

_NEUTRAL: list[Message] = [{"role": "user", "content": "probe"}]
_USUAL_ROLES = {"developer": "system", "human": "user", "gpt": "assistant", "model": "assistant"}


class Conversation(NamedTuple):
    """What a template refused as a whole."""

    prompt: list[Message]
    completion: list[Message]
    side: str
    """``chosen`` or ``rejected``; without a completion it does not count."""

    @property
    def messages(self) -> list[Message]:
        return self.prompt + self.completion

    def place(self, number: int) -> str:
        """A message's place in the row and its role."""
        part, index = "prompt", number
        if number >= len(self.prompt):
            part, index = self.side, number - len(self.prompt)
        return f'message {index + 1} of "{part}" (role "{escape(str(self.messages[number]["role"]))}")'


def explained(
    refusal: DataError, conversation: Conversation, write: Callable[[list[Message]], str]
) -> DataError:
    """The refusal, with the message that the template stumbled over and a fix that it takes.

    A template reads messages in order, so the first that is refused in the same words, with all before it, is
    the one; unless the rest is refused without it too, and is not without another. Where any conversation is
    refused so, it is no message, but what the row tells the template.

    Args:
        refusal: Of the whole conversation; its kind is ``template``.
        conversation: It was refused.
        write: Renders messages as the conversation was.
    """
    messages = conversation.messages

    def refused(tried: list[Message]) -> bool:
        try:
            write(tried)
        except DataError as error:
            return error.what == refusal.what
        return False

    if refused(_NEUTRAL):
        return _rephrased(
            refusal,
            f"{refusal.what}, whatever they are: with the row's tools and settings it renders none",
            f"{SKIP_ROW}; or give the rows the tools and chat_template_kwargs that the template reads",
        )
    number = next((n for n in range(len(messages)) if refused(messages[: n + 1])), None)
    if number is None:
        return refusal
    without = [messages[:n] + messages[n + 1 :] for n in range(len(messages))]
    if not _renders(write, without[number]):
        number = next((n for n, rest in enumerate(without) if rest and _renders(write, rest)), number)
    place = conversation.place(number)
    fix = next((how for how, tried in _repairs(messages, number) if _renders(write, tried)), None)
    fix = f"{SKIP_ROW}; or {fix}" if fix else refusal.fix
    return _rephrased(refusal, refusal.what.replace("the messages", place, 1), fix)


def _renders(write: Callable[[list[Message]], str], messages: list[Message]) -> bool:
    try:
        write(messages)
    except DataError:
        return False
    return True


def _repairs(messages: list[Message], number: int) -> Iterator[tuple[str, list[Message]]]:
    """What a user can do about a message, and the conversation then."""
    message, before, after = messages[number], messages[:number], messages[number + 1 :]
    role = str(message["role"])
    if role in _USUAL_ROLES:
        usual = _USUAL_ROLES[role]
        yield f'give it the role "{usual}"', [*before, {**message, "role": usual}, *after]
    if role in ("system", "developer") and after:
        joined = {**after[0], "content": f"{message['content']}\n\n{after[0]['content']}"}
        yield "put its text before that of the next message", [*before, joined, *after[1:]]
    if before and before[-1]["role"] == role and set(message) == set(before[-1]) == {"role", "content"}:
        joined = {**message, "content": f"{before[-1]['content']}\n\n{message['content']}"}
        yield "join it to the message before it, which has the same role", [*before[:-1], joined, *after]


def _rephrased(refusal: DataError, what: str, fix: str | None) -> DataError:
    error = DataError(what, where=refusal.where, why=refusal.why, fix=fix, kind="template")
    error.__cause__ = refusal.__cause__
    return error
