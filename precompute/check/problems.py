"""What can be wrong with preference data, each with its harm and the way out: the words of ``dpo-opt check``.

Kept apart from the counting, so that a sentence is changed in one place.
"""

from typing import NamedTuple

from dpo_opt.schemas.audit_record import Example, Problem, Severity


class Kind(NamedTuple):
    """One kind of problem."""

    severity: Severity
    title: str
    why: str
    fix: str


_ROW = (
    "correct or remove the rows, or leave them out: `--on-bad-row skip`, "
    "or `dpo-opt convert DATA --output DIR`"
)
_DEDUPLICATE = "`dpo-opt convert DATA --output DIR` keeps the first of each"
_UNREAD = "the row cannot be read as it was meant"

BAD_ROWS: dict[str, Kind] = {
    "unreadable_file": Kind(
        "error",
        "files that cannot be read to their end",
        "their pairs, or those after the damage, would be missing",
        "copy or download the files again",
    ),
    "encoding": Kind("error", "text that is not UTF-8", "another encoding would be other text", _ROW),
    "null_byte": Kind("error", "null bytes", "a crash left a hole in the file, or it is binary", _ROW),
    "json": Kind("error", "lines that are not JSON", _UNREAD, _ROW),
    "not_an_object": Kind("error", "rows that are no objects", _UNREAD, _ROW),
    "nesting": Kind("error", "values nested too deeply", "no pair looks like that", _ROW),
    "duplicate_key": Kind("error", "keys that appear twice", "either value may be meant", _ROW),
    "number": Kind("error", "numbers that are none, or not allowed", "they would spoil the loss", _ROW),
    "missing_key": Kind(
        "error",
        "rows without a part of the pair",
        "a pair needs both completions and their prompt",
        "`--column chosen=NAME` reads a part from another column; or correct the rows",
    ),
    "type": Kind("error", "values of the wrong kind", "they must be text or lists of messages", _ROW),
    "mixed_row": Kind("error", "rows that mix text and messages", "each becomes ids by another rule", _ROW),
    "other_form": Kind(
        "error",
        "rows of another form than their source's first",
        "each form becomes ids by another rule",
        "give each form a `--data` of its own",
    ),
    "empty": Kind("error", "empty completions or prompts", "what has no token has no log-prob", _ROW),
    "surrogate": Kind("error", "half characters", "text was cut inside a character", _ROW),
    "message": Kind("error", "malformed messages", "a template would ignore what it does not know", _ROW),
    "role_order": Kind(
        "error", "completions that the user begins", "the policy would learn to ask, not to answer", _ROW
    ),
    "no_common_prompt": Kind(
        "error", "rows without a prompt", "nothing says what the completions answer", _ROW
    ),
    "prompt_mismatch": Kind(
        "error", "prompts that the messages contradict", "the two ask for different things", _ROW
    ),
    "label": Kind("error", "labels that name no side", "nothing says which completion is preferred", _ROW),
    "tie": Kind("error", "ties", "DPO learns from preferences, and a tie has none", _ROW),
    "shape": Kind("error", "published rows with parts missing", "no pair can be made of them", _ROW),
    "tools": Kind("error", "tools or template settings that cannot be used", _UNREAD, _ROW),
    "no_chat_template": Kind(
        "error",
        "messages, and a tokenizer without a chat template",
        "only the model's own template turns messages into text it knows",
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
        "prompts that the chat template renders differently before a completion",
        "part of the prompt would be trained on as if the model had said it",
        "correct the template; `dpo-opt preview DATA --model M` shows what it renders",
    ),
    "indivisible_text": Kind(
        "error",
        "texts of millions of characters without a space between words",
        "they can only be tokenized as a whole, which takes gigabytes",
        "remove the row, or `--on-bad-row skip`",
    ),
    "vocabulary": Kind(
        "error",
        "token ids beyond the model's vocabulary",
        "the tokenizer is not the model's",
        "use the tokenizer that was saved with the model",
    ),
}
"""Defects of single rows, by the ``kind`` of their error."""

FOUND: dict[str, Kind] = {
    "no_pairs": Kind(
        "error", "nothing to train on", "no row is a usable pair", "check the path, and the problems below"
    ),
    "nothing_fits": Kind(
        "error",
        "no pair fits max_length",
        "every pair would be left out",
        "pass a larger `--max-length`, or `--truncation keep_end`",
    ),
    "merged_splits": Kind(
        "warning",
        "sources that hold several splits, which are read as one",
        "what is meant for evaluation would be trained on",
        "name the split that is meant",
    ),
    "contradictory": Kind(
        "warning",
        "pairs that stand in the data both ways round",
        "the loss pulls one completion up and down at once",
        "`dpo-opt convert DATA --output DIR` removes both; or keep the label you trust",
    ),
    "identical_completions": Kind(
        "warning",
        "pairs whose completions are the same",
        "they prefer nothing; they will be left out",
        "nothing, or `dpo-opt convert DATA --output DIR`",
    ),
    "shared_with_eval": Kind(
        "warning",
        "training pairs whose prompt is in the evaluation data",
        "evaluation would measure what was learnt by heart",
        "`dpo-opt convert TRAIN EVAL --output DIR --eval-split 0.05` splits by prompt",
    ),
    "duplicate": Kind(
        "warning", "pairs that repeat an earlier one", "each counts as often as it stands there", _DEDUPLICATE
    ),
    "near_duplicate": Kind(
        "warning",
        "pairs that nearly repeat an earlier one",
        "they weigh more than their number of ideas",
        "`dpo-opt convert DATA --output DIR --near-duplicates` keeps the first of each",
    ),
    "left_out": Kind(
        "warning",
        "pairs that max_length leaves out",
        "they would not be scored or trained on",
        "pass a larger `--max-length`; the forecast says what each would cost",
    ),
    "no_token": Kind(
        "warning",
        "pairs whose prompt or completion has no token",
        "nothing predicts the first token of a completion, or nothing is scored; they will be left out",
        "remove the rows, or give them the text that is missing",
    ),
    "blank_completion": Kind(
        "warning",
        "completions of white space alone",
        "the policy would learn to say nothing, or never to",
        "remove the rows",
    ),
    "special_token": Kind(
        "warning",
        "texts that spell a special token",
        "it becomes the token itself: a text can end its turn or open another",
        "remove it from the text",
    ),
    "repeated_prompt": Kind(
        "warning",
        "completions that begin with their prompt",
        "the prompt would stand there twice",
        "leave the column `prompt` out: it is found as what both sides begin with",
    ),
    "short_prompt": Kind(
        "warning",
        "prompts that are a few shared characters",
        "without a prompt column, what two texts begin with by chance is taken for the question",
        "`--column prompt=NAME`, or remove the rows",
    ),
    "length_bias": Kind(
        "warning",
        "pairs of a set where length tells which completion is chosen",
        "a policy can lower the loss by writing more, or less, and nothing else",
        "balance the data, or train with a length-normalised loss and watch lengths in the report",
    ),
    "control_character": Kind(
        "warning",
        "control characters in texts",
        "most often what is left of a terminal or of a broken export",
        "remove them",
    ),
    "empty_turn": Kind("warning", "messages without text", "someone's turn is missing", "remove the rows"),
    "cut": Kind(
        "note",
        "pairs that max_length cuts",
        "what was cut is not scored, and a cut completion has no end",
        "pass a larger `--max-length`; the forecast says what each would cost",
    ),
    "merged": Kind(
        "note",
        "prompts whose last token changes when a completion follows",
        "that token counts as completion; a policy that samples from the prompt alone starts elsewhere",
        "end prompts with a line break or a space that completions do not begin with",
    ),
}
"""What only shows among many pairs, or is no reason to refuse one; in the order of harm."""

_RANK = {"error": 0, "warning": 1, "note": 2}


def problem(kind: str, count: int, examples: list[Example], *, skipped: bool = False) -> Problem:
    """A problem in words.

    Args:
        kind: A key of ``BAD_ROWS`` or ``FOUND``.
        count: How often it was found.
        examples: Some of the places.
        skipped: Bad rows are left out, so they stop nothing.
    """
    found = BAD_ROWS.get(kind) or FOUND[kind]
    lowered = skipped and kind in BAD_ROWS and kind != "unreadable_file"
    severity = "warning" if lowered else found.severity
    return Problem(
        kind=kind,
        count=count,
        severity=severity,
        title=found.title,
        why=found.why,
        fix=found.fix,
        examples=examples,
    )


def by_harm(problems: list[Problem]) -> list[Problem]:
    """What stops a later command first, then what harms most."""
    order = [*FOUND, *BAD_ROWS]
    return sorted(problems, key=lambda p: (_RANK[p.severity], order.index(p.kind)))
