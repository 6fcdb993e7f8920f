"""Published forms of feedback that are no pairs and become none by a rule: refused by name, with a way."""

from collections.abc import Set

from dpo_opt.schemas.errors import DataError

PAIR_UP = (
    "python -c \"import polars as p; d = p.read_ndjson('DATA.jsonl'); good = p.col('label'); "
    "d.filter(good).join(d.filter(~good), on='prompt')"
    ".select('prompt', chosen='completion', rejected='completion_right').write_ndjson('pairs.jsonl')\""
)
"""Makes pairs of unpaired rows: every good completion with every bad one of the same prompt."""

_TRL = frozenset({"prompt", "completion", "label"})
_VERDICTS = frozenset({"label", "kto_tag"})
_ANSWERS = frozenset({"completion", "output", "response", "messages", "conversations"})
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
    if names & _VERDICTS and names & _ANSWERS:
        renamed = "" if names >= _TRL else "write the rows as prompt, completion and label, then "
        raise DataError(
            "this is unpaired feedback (one completion and a label), as KTO learns from",
            where=where,
            why="DPO compares two completions of one prompt; which two belong together is yours to say",
            fix=f"{renamed}pair each good completion with each bad one of its prompt: {PAIR_UP}",
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
