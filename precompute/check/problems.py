"""The texts of ``dpo-opt check``: every kind of problem in preference data, why it matters and how to fix it.

pair_statistics.py and audit.py count the problems; the sentences are only here.
"""

import re

from dpo_opt.precompute.check.row_problems import BAD_ROWS, Kind
from dpo_opt.precompute.tokens.truncation import DROP_FIXES, DROP_REASONS
from dpo_opt.schemas.audit_record import Example, Problem

LEAVES_NOTHING = (
    "nothing would be left without them: look at what is read as which part "
    "(`--column PART=NAME`; of pairs chosen and rejected, of single completions completion and label)"
)
"""Of pairs that `convert` removes, where it would remove all."""
MERGED_TURNS = (
    "nothing to do in the data: a chat template that opens the answer with a line break or a special token "
    "has no such prompts"
)
"""Of conversations: where the prompt ends, the chat template says."""
_SKIPPING = re.compile(r", or (leave them out: )?`--on-bad-row skip`.*")


def without_skipping(kind: str) -> str:
    """The fix of bad rows where no other row is left: to leave them out would leave nothing."""
    return _SKIPPING.sub("", BAD_ROWS[kind].fix)


_NO_OTHER_PROMPT = (
    "KTO scores each row with the completion of another prompt too, of the same shard, and there is none"
)
# The word alone, not within an option such as --pairs-per-shard.
_PAIR = re.compile(r"(?<![\w-])pair(s?)\b(?!-)")
_DEDUPLICATE = "`dpo-opt convert DATA --output DIR` keeps the first of each"

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
    "all_no_other_prompt": Kind(
        "error",
        "no pair can be used",
        _NO_OTHER_PROMPT,
        "give the data rows of other prompts, and mix rows or pass a larger `--pairs-per-shard`, so that a "
        "shard has several",
    ),
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
    "two_kinds": Kind(
        "error",
        "pairs beside rows of one completion and a label",
        "no loss is of both, so one folder of shards cannot hold them",
        "score each kind into a `--shards` folder of its own",
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
    "no_weight": Kind(
        "error",
        "pairs whose weight is 0, and there is no other pair",
        "no pair would count in the loss",
        "correct the column `weight`, or leave it out: `--ignore-column weight`",
    ),
    "shared_chosen": Kind(
        "warning",
        "pairs with one and the same chosen text, which nearly all pairs have",
        "the policy would learn to write it whatever it is asked",
        "look at the columns; `--column chosen=NAME` reads the chosen text from another",
    ),
    "shared_rejected": Kind(
        "warning",
        "pairs with one and the same rejected text, which nearly all pairs have",
        "a policy can lower the loss by avoiding this one text, whatever it is asked",
        "look at the columns; `--column rejected=NAME` reads the rejected text from another",
    ),
    "shared_prompt": Kind(
        "warning",
        "pairs with one and the same prompt, which most pairs have",
        "what differs between the questions is in a column that is not read, or the data says little",
        "look at the columns; `--column prompt=NAME` reads the prompt from another",
    ),
    "negative_margin": Kind(
        "warning",
        "pairs whose margin is below 0, or whose rejected completion is rated higher",
        "the data scores the rejected completion higher than the chosen one",
        "exchange the sides where the scores are right, or correct the scores",
    ),
    "zero_margin": Kind(
        "warning",
        "pairs whose margin is 0, or whose completions are rated alike",
        "the data scores both completions alike, so that it prefers neither",
        "remove the rows, or keep them where the label is right and the scores are coarse",
    ),
    "left_out": Kind(
        "warning",
        "pairs that are too long for max_length and left out",
        "they would be neither scored nor trained on",
        "pass a larger `--max-length`; the forecast says what each would cost",
    ),
    "no_other_prompt": Kind(
        "warning",
        "rows of one completion that would be left out because their shard holds a single prompt",
        _NO_OTHER_PROMPT,
        "mix the rows, or pass a larger `--pairs-per-shard`",
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
    "answered_prompt": Kind(
        "warning",
        "prompts that end with an answer of the assistant, behind which both completions answer again",
        "the policy would learn to answer twice; often the conversation holds the chosen answer already",
        "end the prompt with what was asked",
    ),
    "one_label": Kind(
        "warning",
        "rows of one completion that all have the same label",
        "nothing tells what the other label stands for: every completion is pushed the same way",
        "add rows of the other label",
    ),
    "label_balance": Kind(
        "note",
        "rows of one completion with the label that more rows have",
        "KTO's authors weigh labels so that desirable rows count 1 to 4/3 times as much in all as the others",
        "`--desirable-weight` or `--undesirable-weight` of `dpo-opt train`",
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
    "shared_opening": Kind(
        "note",
        "pairs of conversations that begin with the same message of the user as another prompt",
        "`dpo-opt train --eval-split` holds out whole prompts, so the policy may be trained on the beginning "
        "of a conversation that it is evaluated on",
        "`dpo-opt convert DATA --output DIR --eval-split 0.05` holds them out together: score both files, "
        "and pass the second folder as `--eval-shards`",
    ),
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


def problem(
    kind: str, count: int, examples: list[Example], *, skipped: bool = False, fix: str | None = None
) -> Problem:
    """A problem with its texts, ready to be shown.

    Args:
        kind: A key of ``BAD_ROWS`` or ``FOUND``.
        count: How often it was found.
        examples: Some of the places.
        skipped: Bad rows are left out, so they are warnings; files that cannot be read stay errors.
        fix: In place of the kind's own, where that leads nowhere.
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
        fix=fix or found.fix,
        examples=examples,
    )


def of_rows(found: Problem) -> Problem:
    """A problem of data without pairs, where each row is one completion and its label."""
    if found.kind not in FOUND:
        return found
    texts = {name: _PAIR.sub(r"row\1", getattr(found, name)) for name in ("title", "why", "fix")}
    return found.model_copy(update=texts)


def by_harm(problems: list[Problem]) -> list[Problem]:
    """Errors first, then warnings, then notes; within each the most harmful first."""
    order = [*FOUND, *BAD_ROWS]
    return sorted(problems, key=lambda p: (_RANK[p.severity], order.index(p.kind)))
