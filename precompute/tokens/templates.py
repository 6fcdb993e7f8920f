"""Messages to text: the tokenizer's own chat template, and what it must not do to a prompt.

The same messages must give the same text on every machine and day. A template is a program without files or
network; what it can ask for that changes is answered here:

* the time (``strftime_now``): midnight at the start of a date that is fixed for a folder;
* chance (the filter ``random``, the function ``lipsum``): a generator that starts anew for each text.
"""

import contextlib
import datetime
import functools
import inspect
import random
import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dpo_opt.precompute.read.strict_json import SKIP_ROW, escape
from dpo_opt.precompute.tokens.hidden_losses import Known
from dpo_opt.precompute.tokens.tool_calls import Form, has_calls, taken, with_arguments
from dpo_opt.schemas.errors import ConfigError, DataError
from dpo_opt.schemas.pairs import Message, PreferencePair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_LONGEST_TEMPLATE_MESSAGE = 120
_CLOCK = "strftime_now"
# What transformers passes to a template, or to its own function that renders one, under these names.
_PASSED = frozenset({"self", "messages", "conversations", _CLOCK})
_MENTIONS_CHANCE = re.compile(r"\b(random|lipsum)\b")


def chat_template(tokenizer: "PreTrainedTokenizerFast", tools: list[object] | None = None) -> str | None:
    """The template that the tokenizer chooses for messages, with a row's tools; None if it has none."""
    try:
        return str(tokenizer.get_chat_template(tools=cast(list[dict[str, object]] | None, tools)))
    except ValueError:
        return None


def chat_templates(tokenizer: "PreTrainedTokenizerFast") -> dict[str, str]:
    """All templates of a tokenizer by name; a single one is called ``default``."""
    found = tokenizer.chat_template
    if isinstance(found, dict):
        return {str(name): str(text) for name, text in found.items()}
    return {} if found is None else {"default": str(found)}


def asks_for_the_date(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Whether a template may write the time into what it renders."""
    return any(_CLOCK in template for template in chat_templates(tokenizer).values())


def today() -> str:
    """The date here and now, such as ``2026-03-31``."""
    return datetime.date.today().isoformat()


class Renderer:
    """Renders conversations as those of a pair are.

    Raises:
        DataError: The row has a setting that the template does not read, or may not have it.
        ConfigError, DataError: As ``render``, of each call.
    """

    def __init__(
        self, pair: PreferencePair, tokenizer: "PreTrainedTokenizerFast", date: str | None = None
    ) -> None:
        self._pair, self._tokenizer, self._date = pair, tokenizer, date
        self._settings = _template_settings(pair, tokenizer)
        unread = next((name for name in self._settings if not _reads(self.template, name)), None)
        if unread is not None:
            raise DataError(
                f'the chat template does not read "{escape(unread)}" of "chat_template_kwargs"',
                where=pair.where,
                why="the row would be rendered as if it did not say so",
                fix="correct the name, or pass --ignore-column chat_template_kwargs if it is another model's",
                kind="template_loss",
            )

    @property
    def template(self) -> str:
        """The template that the tokenizer chooses; empty if there is none."""
        return chat_template(self._tokenizer, self._pair.tools) or ""

    @property
    def known(self) -> Known:
        """What was found of the template so far."""
        return _KNOWN.setdefault(self._tokenizer, {}).setdefault(self.template, {})

    def beside(self, tools: list[object] | None, documents: object) -> "Renderer":
        """This renderer, for other tools and documents."""
        settings = self._settings if documents is None else {**self._settings, "documents": documents}
        pair = self._pair._replace(tools=tools, chat_template_kwargs=settings or None)
        return Renderer(pair, self._tokenizer, self._date)

    @property
    def added_tokens(self) -> list[str]:
        """Texts that are one token wherever they stand."""
        return list(self._tokenizer.get_added_vocab())

    def __call__(self, conversations: list[list[Message]], *, opens_first: bool = True) -> list[str]:
        """Conversations as text; the first is opened for generation, unless ``opens_first`` is false."""
        return render(
            [self._as_taken(messages) for messages in conversations],
            self._tokenizer,
            where=self._pair.where,
            date=self._date,
            tools=self._pair.tools,
            row_settings=self._settings,
            opens_first=opens_first,
        )

    def marked(self, messages: list[Message]) -> tuple[str, list[tuple[int, int]]]:
        """A conversation as text, and the spans of characters that the template marks as generated."""
        from transformers.utils.chat_template_utils import render_jinja_template

        with _chance_repeats(), _refusals(self._pair.where, self._tokenizer):
            (text,), (spans,) = render_jinja_template(
                [self._as_taken(messages)],
                tools=cast(Any, self._pair.tools),
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **{
                    **self._tokenizer.special_tokens_map,
                    _CLOCK: _clock(self._date or today()),
                    **self._settings,
                },
            )
        return text, [(int(start), int(stop)) for start, stop in spans]

    def _as_taken(self, messages: list[Message]) -> list[Message]:
        """The messages with the arguments of tool calls in the form that the template takes."""
        if not self.template or not has_calls(messages):
            return messages
        return with_arguments(messages, takes=_arguments_taken(self.template, self._tokenizer))


_KNOWN: weakref.WeakKeyDictionary[object, dict[str, Known]] = weakref.WeakKeyDictionary()
_FORMS: weakref.WeakKeyDictionary[object, dict[str, Form]] = weakref.WeakKeyDictionary()


def _arguments_taken(template: str, tokenizer: "PreTrainedTokenizerFast") -> Form:
    """The form of a tool call's arguments that a template takes, found once for each."""
    forms = _FORMS.setdefault(tokenizer, {})
    if template not in forms:
        forms[template] = taken(
            lambda messages, tools: str(
                cast(Any, tokenizer).apply_chat_template(
                    messages, tools=tools, chat_template=template, tokenize=False, **{_CLOCK: _clock(today())}
                )
            )
        )
    return forms[template]


def _template_settings(pair: PreferencePair, tokenizer: "PreTrainedTokenizerFast") -> dict[str, object]:
    """The row's settings of the template. A row may not set those that the call itself passes."""
    settings = pair.chat_template_kwargs or {}
    if settings:
        arguments = inspect.signature(tokenizer.apply_chat_template).parameters.keys() | _PASSED
        taken = next((name for name in settings if name in arguments and name != "documents"), None)
        if taken is not None:
            raise DataError(
                f'"chat_template_kwargs" sets {taken}, which is no setting of a template',
                where=pair.where,
                why="it would change what is rendered or tokenized for this row alone",
                fix="remove it from the row",
                kind="tools",
            )
    return settings


@functools.lru_cache(maxsize=64)
def _reads(template: str, name: str) -> bool:
    """Whether a template names a setting; what it does with documents is looked for in the text."""
    named = name == "documents" or re.search(rf"\b{re.escape(name)}\b", template)
    return bool(named) or not template


def render(
    conversations: list[list[Message]],
    tokenizer: "PreTrainedTokenizerFast",
    *,
    where: str,
    date: str | None = None,
    tools: list[object] | None = None,
    row_settings: dict[str, object] | None = None,
    opens_first: bool = True,
) -> list[str]:
    """Conversations as text; the first is a prompt, and ends with the generation prompt.

    Args:
        conversations: Messages.
        tokenizer: Its template renders them.
        where: For the message of an error.
        date: What the template is told when it asks for the time; default today.
        tools: Of the row.
        row_settings: The row's ``chat_template_kwargs``.
        opens_first: False: no conversation ends with the generation prompt.

    Raises:
        ConfigError: The tokenizer has no chat template, or one that is no template.
        DataError: The template refuses the messages, or there is one for rows with tools alone.
    """
    template = chat_template(tokenizer, tools)
    if template is None and (names := ", ".join(chat_templates(tokenizer))):
        raise DataError(
            f"the tokenizer has chat templates for rows with tools alone ({names}), and the row has none",
            where=where,
            why="transformers renders such a row with a template called default, which is not there",
            fix=f"{SKIP_ROW}; or save the template for rows without tools with the tokenizer "
            "(chat_template.jinja), or give the row the tools that the model could call",
            kind="no_chat_template",
        )
    if template is None:
        raise ConfigError(
            "the data holds messages, but the tokenizer has no chat template",
            where=where,
            why="only the template the model was trained with turns messages into the text it knows",
            fix="save one with the tokenizer (chat_template.jinja), or use data whose rows are text",
        )
    render = functools.partial(
        tokenizer.apply_chat_template,
        chat_template=template,
        tokenize=False,
        tools=tools,
        **{_CLOCK: _clock(date or today()), **(row_settings or {})},
    )
    texts = []
    with _refusals(where, tokenizer):
        for i, messages in enumerate(conversations):
            with _chance_repeats() if _MENTIONS_CHANCE.search(template) else contextlib.nullcontext():
                text = render(messages, add_generation_prompt=opens_first and i == 0)
            text.encode()  # which no half of a character is: a ValueError, where a tokenizer would stop
            texts.append(text)
    return texts


@contextlib.contextmanager
def _refusals(where: str, tokenizer: "PreTrainedTokenizerFast") -> Iterator[None]:
    """Within it, what stops a template is an error of the row, unless it is no template at all."""
    from jinja2.exceptions import TemplateError, TemplateSyntaxError

    file = Path(tokenizer.name_or_path) / "chat_template.jinja"
    try:
        yield
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"the chat template has an error in line {error.lineno} ({error.message})",
            where=str(file if file.is_file() else tokenizer.name_or_path or where),
            why="no row of messages can be rendered with it",
            fix="correct that line, or take the template that was published with the model",
        ) from error
    # Python compiles what jinja makes of a template, and has limits of its own.
    except SyntaxError as error:
        raise ConfigError(
            f"the chat template cannot be compiled ({error.msg})",
            where=str(file if file.is_file() else tokenizer.name_or_path or where),
            why="no row of messages can be rendered with it",
            fix="take the template that was published with the model",
        ) from error
    # A template is a program of its own: it may add text to a list, ask for what a message does not have,
    # divide by their number, or want more memory than there is.
    except (
        TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        MemoryError,
    ) as error:
        said = str(error) or type(error).__name__
        raise DataError(
            f"the chat template refuses the messages ({said[:_LONGEST_TEMPLATE_MESSAGE]})",
            where=where,
            why="the model was not trained on conversations of this shape",
            fix=f"{SKIP_ROW}; or correct the roles and their order",
            kind="template",
        ) from error


def _clock(date: str) -> Callable[[str], str]:
    """``strftime_now`` of transformers' templates, on a given day."""
    midnight = datetime.datetime.fromisoformat(date)
    return lambda text: midnight.strftime(text)


@contextlib.contextmanager
def _chance_repeats() -> Iterator[None]:
    """Within it, Python's own generator, from which templates draw, starts from one state."""
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)
