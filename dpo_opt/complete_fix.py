"""Fixes with what the user's own command said, in place of the words that stand for it."""

import re
from collections.abc import Iterator

from dpo_opt.precompute.read.strict_json import FIX_ROW, SKIP_ROW
from dpo_opt.schemas.errors import quoted
from dpo_opt.schemas.settings import Settings

# The options that say how data is read, which the commands that fixes name have too.
_OF_THE_DATA = ("data_share", "column", "ignore_column")
_PLAIN = re.compile(r"[\w./-]+\.jsonl")
"""A name that can stand between quotes of any kind."""


def complete_fix(fix: str, config: Settings) -> str:
    """A fix with the command's data for DATA (and EVAL), and its model for M.

    Args:
        fix: As the stage wrote it that found the error, and that may not know the settings.
        config: Of the command that runs.
    """
    given = dict(config)
    data, eval_data, model = given.get("data"), given.get("eval_data"), given.get("model")
    if isinstance(data, list):
        if len(data) == 1 and _PLAIN.fullmatch(data[0]):
            fix = fix.replace("'DATA.jsonl'", f"'{data[0]}'")
        evaluation = " ".join(map(quoted, eval_data or ()))
        if evaluation:
            fix = fix.replace("DATA EVAL", f"DATA {evaluation}")
        own = (" --data " if "--data DATA" in fix else " ").join(map(quoted, data))
        options = "".join(f" {option}" for option in _options(given))
        fix = re.sub(r"(dpo-opt \w+ (?:--\w+ \S+ )*(?:--data )?)DATA\b", lambda m: m[1] + own + options, fix)
    elif "prompts" in given:
        fix = _of_prompts(fix)
    if model is not None:
        fix = re.sub(r"--model M\b", lambda _: f"--model {quoted(model)}", fix)
    return fix


def _of_prompts(fix: str) -> str:
    """The fix of a command that reads prompts alone: it has no --data, and `check` is for pairs."""
    for of_pairs in (FIX_ROW, SKIP_ROW):
        fix = fix.replace(of_pairs, "correct or remove the row")
    return re.sub(r"--data\b(?!-)", "--prompts", fix)


def _options(given: dict[str, object]) -> Iterator[str]:
    for name in _OF_THE_DATA:
        value = given.get(name)
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, dict):
            yield from (f"{option} {quoted(f'{part}={own}')}" for part, own in value.items())
        elif isinstance(value, list):
            yield from (f"{option} {quoted(one)}" for one in value)
