"""The first row of the data that can be used, so that nothing is planned where there is none."""

import sys
from collections import Counter

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.read.datasets import BadRow, scan_pairs
from dpo_opt.precompute.shards.reference import Reference
from dpo_opt.precompute.tokens.tokenize import PairTokenizer
from dpo_opt.precompute.tokens.truncation import DROP_FIXES
from dpo_opt.schemas.counts import counted
from dpo_opt.schemas.errors import ConfigError, DataError
from dpo_opt.schemas.models import context_length
from dpo_opt.schemas.pairs import PreferencePair, TokenizedPair

_ROWS_TRIED = 100
"""Bad rows at the beginning of the data after which all are taken for bad."""
_CORRECT_ROWS = "correct the rows as `dpo-opt check DATA --model M` says"


def first_usable(config: PrecomputeConfig, reference: Reference, tokenizer: PairTokenizer) -> PreferencePair:
    """The first row that survives tokenization; what it is, the others are too.

    Raises:
        ConfigError: A setting is only of pairs, and it is one completion with its label.
        DataError: There is none.
    """
    reasons: Counter[str] = Counter()
    refused: list[DataError] = []
    needed = completion = sys.maxsize
    noun = "row"
    for item in scan_pairs(config):
        if len(refused) == _ROWS_TRIED:
            break
        if isinstance(item, BadRow):
            refused += [item.error] if config.on_bad_row == "error" else []
            reasons["bad_row"] += 1
            continue
        noun = "pair" if item.label is None else "row"
        (ids,) = tokenizer.encode([item])
        if isinstance(ids, DataError):
            refused += [ids] if config.on_bad_row == "error" else []
            reasons[f"bad_row:{ids.kind}"] += 1
            continue
        fitted = tokenizer.fit(item, ids)
        if isinstance(fitted, TokenizedPair):
            if refused:
                raise refused[0]
            if item.label is not None:
                _require_unpaired_settings(config)
            return item
        reasons[fitted.reason] += 1
        if fitted.reason not in DROP_FIXES:
            longest = max(len(ids.chosen), len(ids.rejected))
            needed, completion = min(needed, len(ids.prompt) + longest), min(completion, longest)
    if refused:
        raise _as_all_are(refused[0])
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    raise DataError(
        f"none of {counted(reasons.total(), noun)} can be used ({counts})",
        where=", ".join(config.data),
        why="nothing would be left to train on",
        fix=_way_out(config, reference, reasons.most_common(1)[0][0], needed, completion),
    )


def _as_all_are(error: DataError) -> DataError:
    """The error of the first row where every row has one, so that to leave such rows out leaves nothing."""
    if "--on-bad-row skip" not in (error.fix or ""):
        return error
    return DataError(error.what, where=error.where, why=error.why, fix=_CORRECT_ROWS, kind=error.kind)


def _way_out(
    config: PrecomputeConfig, reference: Reference, reason: str, needed: int, completion: int
) -> str:
    """What makes a pair usable, by the reason that most have.

    Args:
        config: Of the run.
        reference: The model that scores.
        reason: A ``DropReason``, or ``bad_row`` and a kind.
        needed: Tokens of the shortest pair that is too long.
        completion: Tokens of the shortest longer completion among those pairs.
    """
    if reason.startswith("bad_row"):
        return _CORRECT_ROWS
    if reason in DROP_FIXES:
        return DROP_FIXES[reason]
    if needed <= (context_length(reference.folder) or needed):
        others = "`dpo-opt check DATA --model M` forecasts others"
        return f"pass --max-length {needed}, which keeps the shortest row; {others}"
    if config.truncation != "keep_end" and completion < reference.max_length:
        return "pass --truncation keep_end"
    return "shorten the texts, or pass a --model with a longer context"


def _require_unpaired_settings(config: PrecomputeConfig) -> None:
    if config.train_on == "first-difference":
        raise ConfigError(
            "--train-on first-difference compares two completions, and the rows have one and a label",
            where=", ".join(config.data),
            why="no turn would count",
            fix="pass --train-on last, or leave --train-on out",
        )
    if config.pairs_per_shard == 1:
        raise ConfigError(
            "--pairs-per-shard 1 leaves a row with one completion and a label alone",
            where=", ".join(config.data),
            why="KTO scores each prompt with another row's completion too, of the same shard",
            fix="leave --pairs-per-shard out",
        )
