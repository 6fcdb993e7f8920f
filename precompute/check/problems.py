"""The texts of ``dpo-opt check``: every kind of problem in preference data, why it matters and how to fix it.

pair_statistics.py and audit.py count the problems; the sentences are only here.
"""

from typing import NamedTuple

from dpo_opt.precompute.read.foreign_forms import PAIR_UP
from dpo_opt.precompute.tokens.truncation import DROP_FIXES, DROP_REASONS
from dpo_opt.schemas.audit_record import Example, Problem, Severity


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
_DEDUPLICATE = "`dpo-opt convert DATA --output DIR` keeps the first of each"
_UNREAD = "what the row was meant to say cannot be known"

BAD_ROWS: dict[str, Kind] = {
    "unreadable_file": Kind(
        "error",
        "files that cannot be read to their end",
        "the pairs after the damage would be missing",
        "copy or download the files again",
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
    "prompt_column": Kind(
        "error",
        "columns that may belong to the prompt, and that nothing would read",
        "the answers were given to a prompt that includes them",
        "read them as each row below says, or leave them out with `--ignore-column NAME`",
    ),
    "unpaired": Kind(
        "error",
        "unpaired feedback (one completion and a label)",
        "DPO compares two completions of one prompt; which two belong together is yours to say",
        f"pair each good completion with each bad one of its prompt: {PAIR_UP}",
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
        "completions that begin with a user's message",
        "the policy would learn to ask, not to answer",
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

FOUND: dict[str, Kind] = {
    "no_pairs": Kind(
        "error", "nothing to train on", "no row is a usable pair", "check the path, and the problems below"
    ),
    "nothing_fits": Kind(
        "error",
        "no pair fits max_length",
        "every pair would be left out",
        "pass a larger `--max-length`; the forecast says what each would keep",
    ),
    **{
        f"all_{reason}": Kind("error", "no pair can be used", why, DROP_FIXES[reason])
        for reason, why in DROP_REASONS.items()
        if reason in DROP_FIXES
    },
    "merged_splits": Kind(
        "warning",
        "sources with several splits (such as train and test), read as one",
        "pairs that are meant for evaluation would be trained on",
        "name the split you want",
    ),
    "contradictory": Kind(
        "warning",
        "pairs that are in the data both ways round",
        "the loss pulls the same completion up and down at once",
        "`dpo-opt convert DATA --output DIR` removes both; or keep the label you trust",
    ),
    "identical_completions": Kind(
        "warning",
        "pairs whose two completions are the same",
        "they state no preference; they will be left out",
        "nothing to do, or `dpo-opt convert DATA --output DIR` removes them",
    ),
    "shared_with_eval": Kind(
        "warning",
        "training pairs whose prompt is in the evaluation data",
        "evaluation would measure what the policy learnt by heart",
        "`dpo-opt convert DATA EVAL --output DIR --eval-split 0.05` splits by prompt",
    ),
    "duplicate": Kind(
        "warning", "pairs that repeat an earlier pair", "each copy counts again in the loss", _DEDUPLICATE
    ),
    "near_duplicate": Kind(
        "warning",
        "pairs that nearly repeat an earlier pair",
        "near-copies count several times in the loss",
        "`dpo-opt convert DATA --output DIR --near-duplicates` keeps the first of each",
    ),
    "shared_prompt": Kind(
        "warning",
        "pairs with one and the same prompt, which most pairs have",
        "what differs between the questions is in a column that is not read, or the data says little",
        "look at the columns; `--column prompt=NAME` reads the prompt from another",
    ),
    "negative_margin": Kind(
        "warning",
        "pairs whose margin is below 0",
        "the data scores the rejected completion higher than the chosen one",
        "exchange the sides where the scores are right, or correct the scores",
    ),
    "zero_margin": Kind(
        "warning",
        "pairs whose margin is 0",
        "the data scores both completions alike, so that it prefers neither",
        "remove the rows, or keep them where the label is right and the scores are coarse",
    ),
    "left_out": Kind(
        "warning",
        "pairs that are too long for max_length and left out",
        "they would be neither scored nor trained on",
        "pass a larger `--max-length`; the forecast says what each would cost",
    ),
    "no_token": Kind(
        "warning",
        "pairs whose prompt or completion has no token",
        "a completion's first token needs a token before it, and an empty completion has no log-prob; "
        "they will be left out",
        "remove the rows, or add the missing text",
    ),
    "blank_completion": Kind(
        "warning",
        "completions that are only white space",
        "the policy would learn to say nothing, or to avoid saying nothing",
        "remove the rows",
    ),
    "no_end": Kind(
        "warning",
        "completions that end without a token that stops generation",
        "the policy would not learn to stop",
        "let the chat template write the EOS token behind an assistant's message",
    ),
    "unknown_end": Kind(
        "warning",
        "completions that end with a special token at which generation does not stop",
        "a policy that writes it would go on behind it",
        'list its id under "eos_token_id" in generation_config.json in a copy of the model\'s folder',
    ),
    "several_ends": Kind(
        "warning",
        "completions that end with more than one token that stops generation",
        "generation stops at the first, and the policy would be trained on what it never gets to write",
        "remove one of them from the texts or from the chat template",
    ),
    "added_end": Kind(
        "warning",
        "texts behind whose EOS token the tokenizer adds another one",
        "generation stops at the first, and the policy would be trained on what it never gets to write",
        'remove the one from "post_processor" of tokenizer.json in a copy of the model\'s folder',
    ),
    "prompt_end": Kind(
        "warning",
        "prompts that end with a token that stops generation",
        "to a policy that samples from them the answer has ended before it begins",
        "remove the token from the prompt, or let the chat template open the answer (add_generation_prompt)",
    ),
    "special_token": Kind(
        "warning",
        "texts that spell a special token",
        "they are tokenized as that token, so a text can end its turn or open another",
        "remove it from the text",
    ),
    "repeated_prompt": Kind(
        "warning",
        "completions that begin with their prompt",
        "the model would see the prompt twice",
        "remove the column `prompt`: the prompt is then what both completions begin with",
    ),
    "short_prompt": Kind(
        "warning",
        "prompts of only a few characters, which two texts happen to share",
        "without a prompt column, the text that both completions begin with is taken as the prompt",
        "`--column prompt=NAME`, or remove the rows",
    ),
    "length_bias": Kind(
        "warning",
        "pairs of a set where length tells which completion is chosen",
        "a policy can lower the loss just by writing longer or shorter",
        "balance the data, or train with a length-normalised loss and watch lengths in the report",
    ),
    "control_character": Kind(
        "warning",
        "control characters in texts",
        "they are usually left over from a terminal or a broken export",
        "remove them from the texts",
    ),
    "empty_turn": Kind("warning", "messages without text", "someone's turn is missing", "remove the rows"),
    "cut": Kind(
        "note",
        "pairs that are cut to max_length",
        "the part that is cut is not scored, and a completion cut at its end has no end of turn",
        "pass a larger `--max-length`; the forecast says what each would cost",
    ),
    "merged": Kind(
        "note",
        "prompts whose last token changes when a completion follows",
        "that token counts as completion; a policy that samples from the prompt alone starts differently",
        "end prompts with a line break, or with a space that completions do not begin with",
    ),
    "earlier_thought": Kind(
        "note",
        "prompts of which the chat template leaves out the thoughts of earlier turns",
        "templates of reasoning models do so by design, whenever the model answers: the pairs are used as "
        "the model will be asked",
        "nothing to do; where later answers need the thoughts, use a template that keeps them",
    ),
}
"""Problems that show only among many pairs, or that are no reason to refuse a row; the worst first."""

_RANK = {"error": 0, "warning": 1, "note": 2}


def problem(kind: str, count: int, examples: list[Example], *, skipped: bool = False) -> Problem:
    """A problem with its texts, ready to be shown.

    Args:
        kind: A key of ``BAD_ROWS`` or ``FOUND``.
        count: How often it was found.
        examples: Some of the places.
        skipped: Bad rows are left out, so they are warnings; files that cannot be read stay errors.
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
    """Errors first, then warnings, then notes; within each the most harmful first."""
    order = [*FOUND, *BAD_ROWS]
    return sorted(problems, key=lambda p: (_RANK[p.severity], order.index(p.kind)))
