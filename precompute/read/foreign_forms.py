"""Published forms of feedback that no rule reads: refused by name, with a way."""

from collections.abc import Set

from dpo_opt.precompute.read.shape_parts import LABEL_KEYS, PROMPT_KEYS
from dpo_opt.schemas.errors import DataError

_ANSWERS = ("completion", "output", "response")
_CONVERSATIONS = ("messages", "conversations")
_RECORD = frozenset({"fields", "responses", "suggestions"})
_QUESTION = (".responses", ".suggestion")


def refuse_foreign(names: Set[str], where: str) -> None:
    """Refuse a row, or a table, whose keys are those of such a form.

    Args:
        names: Its keys, which are those of no form that is read.
        where: Names it in messages.

    Raises:
        DataError: They are.
    """
    if not names.isdisjoint(LABEL_KEYS) and not names.isdisjoint(_ANSWERS + _CONVERSATIONS):
        raise DataError(
            "this is feedback of one completion and a label, without a prompt or under other names",
            where=where,
            why="KTO learns from a prompt, a completion and a label, and which key is which cannot be known",
            fix=_renaming(names),
            kind="unpaired",
        )
    if names >= _RECORD or any(name.endswith(_QUESTION) for name in names):
        raise DataError(
            "these are records that Argilla exported, with the fields and answers of its questions",
            where=where,
            why="whose answers count is yours to say, and a ranking has lost its ranks (Argilla 2.8 exports "
            "the names in order, so that a tie looks like a preference)",
            fix="write each record's prompt, chosen and rejected from its answers, as docs/data.md shows",
            kind="annotations",
        )


def _renaming(names: Set[str]) -> str:
    """The settings that read such a row by its keys, where each of its parts has one."""
    keys = {"prompt": PROMPT_KEYS, "completion": _ANSWERS, "label": LABEL_KEYS}
    found = {part: next((key for key in known if key in names), None) for part, known in keys.items()}
    if None in found.values():
        return "write the rows as prompt, completion and label"
    return "pass " + " ".join(f"--column {part}={key}" for part, key in found.items() if part != key)
