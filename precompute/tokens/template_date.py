"""The day that a chat template is told which asks for the time, where a command may have it from several."""

from typing import TYPE_CHECKING, NamedTuple

from dpo_opt.precompute.tokens.templates import asks_for_the_date, today
from dpo_opt.schemas.errors import ConfigError, quoted
from dpo_opt.schemas.locations import AnyPath
from dpo_opt.schemas.manifest import load_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ChosenDate(NamedTuple):
    """A day, and who says so."""

    date: str | None
    """None where the template does not ask for the time."""
    origin: str | None

    def as_record(self) -> dict[str, str | None]:
        """What ``--json`` shows of it."""
        return {"template_date": self.date, "template_date_from": self.origin}

    def in_words(self) -> str | None:
        """A line for people; None where there is no date."""
        if self.date is None:
            return None
        more = "; --template-date takes another day" if self.origin == "today" else ""
        return f"the chat template is told the date {self.date} (from: {self.origin}{more})"


def chosen_date(
    tokenizer: "PreTrainedTokenizerFast", *, given: str | None, shards: AnyPath | None
) -> ChosenDate:
    """The day given by the user, else that of a folder, else today.

    Args:
        tokenizer: Its chat template asks for the time, or does not.
        given: ``--template-date``.
        shards: A finalized folder that the rows belong to.

    Raises:
        ConfigError: A day is given, and the template does not ask for it.
        DataError: The folder has no valid manifest.
    """
    refuse_unused(given, tokenizer)
    of_folder = None if shards is None else load_manifest(shards).fingerprint.template_date
    if not asks_for_the_date(tokenizer):
        return ChosenDate(None, None)
    if given is not None:
        return ChosenDate(given, "--template-date")
    if of_folder is not None:
        return ChosenDate(of_folder, quoted(shards))
    return ChosenDate(today(), "today")


def refuse_unused(given: str | None, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Refuse ``--template-date`` for a tokenizer whose templates would not be told it.

    Raises:
        ConfigError: They do not ask for the time.
    """
    if given is None or asks_for_the_date(tokenizer):
        return
    raise ConfigError(
        "--template-date would have no effect: the chat template does not ask for the date",
        why="a template that writes a date of its own (Llama 3.1's) goes on writing that one",
        fix="leave --template-date out; a row sets what such a template reads by chat_template_kwargs",
    )
