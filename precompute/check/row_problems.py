"""The texts of ``dpo-opt check`` about single rows that cannot be used."""

from typing import NamedTuple

from dpo_opt.schemas.audit_record import Severity


class Kind(NamedTuple):
    """One kind of problem: how bad it is, and the three texts that a user reads."""

    severity: Severity
    title: str
    why: str
    fix: str


_ROW = (
    "correct or remove the rows, or leave them out: `--on-bad-row skip`, "
    "or `dpo-opt convert DATA --output DIR`"
)
_UNREAD = "what the row was meant to say cannot be known"

BAD_ROWS: dict[str, Kind] = {
    "unreadable_file": Kind(
        "error",
        "files that cannot be read to their end",
        "the pairs after the damage would be missing",
        "do what each file below needs; one that is cut off is copied or downloaded again",
    ),
    "encoding": Kind("error", "text that is not UTF-8", "a guessed encoding would change the text", _ROW),
    "null_byte": Kind("error", "null bytes", "a crash left a hole in the file, or the file is binary", _ROW),
    "json": Kind("error", "lines that are not JSON", _UNREAD, _ROW),
    "not_an_object": Kind("error", "rows that are not JSON objects", _UNREAD, _ROW),
    "nesting": Kind("error", "values nested too deeply", "no preference pair looks like that", _ROW),
    "duplicate_key": Kind("error", "keys that appear twice in one object", "either value may be meant", _ROW),
    "number": Kind(
        "error", "invalid numbers (NaN, infinite, not allowed)", "they would spoil the loss", _ROW
    ),
    "missing_key": Kind(
        "error",
        "rows without a part of the pair",
        "a pair needs a prompt, a chosen and a rejected completion",
        "`--column PART=NAME` reads a part (such as prompt) from another column; or correct the rows",
    ),
    "wrapped": Kind(
        "error",
        "pairs that stand inside another object",
        "each row is one pair, with its parts as keys of its own",
        "take them out by the command beside each row below",
    ),
    "prompt_column": Kind(
        "error",
        "columns that may belong to the prompt, and that nothing would read",
        "the answers were given to a prompt that includes them",
        "read them as each row below says, or leave them out with `--ignore-column NAME`",
    ),
    "two_sources": Kind(
        "error",
        "rows that say one part of the pair under two keys, and differently",
        "which of the two is meant cannot be known",
        "correct the rows, or read one of the two as each row below says",
    ),
    "unpaired": Kind(
        "error",
        "feedback of one completion and a label, without a prompt or under other names",
        "KTO learns from a prompt, a completion and a label, and which key is which cannot be known",
        "read each part by its name, as in `--column completion=NAME`, or write prompt, completion and label",
    ),
    "annotations": Kind(
        "error",
        "records that Argilla exported",
        "whose answers count, and what a ranking without ranks prefers, is yours to say",
        "write each record's prompt, chosen and rejected from its answers, as docs/data.md shows",
    ),
    "type": Kind("error", "values of the wrong kind", "they must be text or lists of messages", _ROW),
    "mixed_row": Kind("error", "rows that mix text and messages", "the two are tokenized differently", _ROW),
    "other_form": Kind(
        "error",
        "rows of another form (text or messages) than the first row of their source",
        "text and messages are tokenized differently",
        "give each form a `--data` of its own",
    ),
    "empty": Kind("error", "empty completions or prompts", "a text without tokens has no log-prob", _ROW),
    "surrogate": Kind("error", "half characters", "the text was cut inside a character", _ROW),
    "message": Kind(
        "error", "malformed messages", "a chat template would ignore the parts it does not know", _ROW
    ),
    "role_order": Kind(
        "error",
        "completions that a user begins, or in which the assistant says nothing",
        "the policy would learn to speak as a user or a tool, not to answer",
        _ROW,
    ),
    "no_common_prompt": Kind(
        "error", "rows without a prompt", "nothing says what the completions answer", _ROW
    ),
    "prompt_mismatch": Kind(
        "error",
        "prompts that differ from the one in the messages",
        "it is unclear which prompt the completions answer",
        _ROW,
    ),
    "label": Kind(
        "error", "labels that name neither side", "nothing says which completion is preferred", _ROW
    ),
    "tie": Kind("error", "ties", "DPO learns from preferences, and a tie has none", _ROW),
    "shape": Kind(
        "error", "rows of a known dataset with parts missing", "no pair can be made from such a row", _ROW
    ),
    "tools": Kind("error", "tools or template settings that cannot be used", _UNREAD, _ROW),
    "no_chat_template": Kind(
        "error",
        "messages, but a tokenizer without a chat template for them",
        "only the model's own template turns messages into the text it was trained on",
        "save a chat_template.jinja with the tokenizer, or use rows of text",
    ),
    "template": Kind(
        "error",
        "conversations that the chat template refuses",
        "the model was not trained on conversations of this shape",
        "correct the roles and their order, or `--on-bad-row skip`",
    ),
    "template_mismatch": Kind(
        "error",
        "prompts that the chat template renders differently when a completion follows",
        "part of the prompt would be trained on as if the model had written it",
        "correct the template; `dpo-opt preview DATA --model M` shows what it renders",
    ),
    "turns": Kind(
        "error",
        "completions in which the assistant's turns cannot be told from the others",
        "what users and tools say would be trained on as if the model had said it",
        "cut the conversations after the first answer that differs, or `--on-bad-row skip`",
    ),
    "template_loss": Kind(
        "error",
        "rows of which the chat template leaves something out",
        "the pair would be trained on as a conversation that is not in the data",
        "correct role or key as each row below says, use a template that writes it, or `--on-bad-row skip`",
    ),
    "indivisible_text": Kind(
        "error",
        "texts of millions of characters without a space between words",
        "such a text can only be tokenized as a whole, which takes gigabytes of memory",
        "remove the row, or `--on-bad-row skip`",
    ),
    "vocabulary": Kind(
        "error",
        "token ids beyond the model's vocabulary",
        "the tokenizer does not belong to this model",
        "use the tokenizer that was saved with the model",
    ),
}
"""Problems of single rows, by the ``kind`` of the DataError that the row raises."""
