"""What a ``max_length`` would do to pairs, and what scoring them would take: arithmetic on their lengths."""

from pathlib import Path
from typing import assert_never

import numpy as np
import numpy.typing as npt

from dpo_opt.precompute.check.other_prompts import OtherPrompts
from dpo_opt.precompute.check.pair_statistics import Facts, mixed_hash
from dpo_opt.precompute.config import CheckConfig, Truncation
from dpo_opt.precompute.tokens.max_length import resolve_max_length
from dpo_opt.precompute.tokens.mismatched import NO_OTHER_PROMPT
from dpo_opt.precompute.tokens.truncation import DropReason
from dpo_opt.schemas.audit_record import Estimate, TruncationForecast
from dpo_opt.schemas.models import context_length

Mask = npt.NDArray[np.bool_]

_FORECAST_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
# An id of a prompt token; an id and a log-prob of a completion token.
_BYTES = np.array([4, 8, 8])
_FLOPS = 0.4 * 989e12


def kept_pairs(
    tokens: npt.NDArray[np.int32],
    *,
    max_length: int,
    truncation: Truncation,
    others: OtherPrompts | None = None,
) -> tuple[Mask, dict[str, int]]:
    """Which pairs ``fit_ids`` keeps, and how many it leaves out for which reason, from lengths alone.

    Args:
        tokens: (P, 5): lengths of prompt, chosen and rejected, then ``alike`` and ``uncounted`` of
            ``PairIds``.
        max_length: Most tokens of prompt plus completion.
        truncation: What happens to longer ones.
        others: Of data with unpaired rows, to leave out those without a completion of another prompt, too.
    """
    prompt, chosen, rejected, alike, uncounted = tokens.T
    longest, shortest = np.maximum(chosen, rejected), np.minimum(chosen, rejected)
    reasons: list[tuple[DropReason, Mask]] = [
        ("empty_prompt", prompt == 0),
        ("empty_completion", shortest == 0),
        ("identical_completions", (alike == chosen) & (alike == rejected)),
    ]
    match truncation:
        case "keep_start":
            reasons.append(("prompt_fills_max_length", prompt >= max_length))
            reasons.append(("nothing_counts_after_truncation", max_length - prompt <= uncounted))
            reasons.append(("identical_after_truncation", max_length - prompt <= alike))
        case "keep_end":
            reasons.append(("completion_fills_max_length", longest >= max_length))
        case "drop":
            reasons.append(("longer_than_max_length", prompt + longest > max_length))
        case _:
            assert_never(truncation)
    kept = np.ones(len(tokens), dtype=bool)
    dropped: dict[str, int] = {}
    for reason, mask in reasons:
        count = int((mask & kept).sum())
        if count:
            dropped[reason] = count
        kept &= ~mask
    if others is not None:
        without = others.without(tokens, kept, max_length=max_length)
        if without.any():
            dropped[NO_OTHER_PROMPT] = int(without.sum())
        kept &= ~without
    return kept, dropped


def forecast(
    tokens: npt.NDArray[np.int32],
    *,
    max_length: int,
    truncation: Truncation,
    others: OtherPrompts | None = None,
) -> TruncationForecast:
    """What ``max_length`` would do to the pairs; arguments as those of ``kept_pairs``."""
    kept, dropped = kept_pairs(tokens, max_length=max_length, truncation=truncation, others=others)
    cut = int((kept & (tokens[:, 0] + tokens[:, 1:3].max(axis=1) > max_length)).sum())
    return TruncationForecast(max_length=max_length, whole=int(kept.sum()) - cut, cut=cut, dropped=dropped)


def forecast_lengths(
    tokens: npt.NDArray[np.int32], max_length: int, *, context: int | None = None
) -> list[int]:
    """Powers of two up to the first that holds everything, and the one that was asked for.

    Args:
        tokens: As in ``kept_pairs``.
        max_length: What was asked for.
        context: Most tokens that the model takes. It stands in place of all that are larger.
    """
    longest = int((tokens[:, 0] + tokens[:, 1:3].max(axis=1)).max())
    shorter = [length for length in _FORECAST_LENGTHS if length < longest]
    enough = [length for length in _FORECAST_LENGTHS if length >= longest][:1]
    return _within({*shorter, *enough, max_length}, context)


def lengths_that_cut_prompts(config: CheckConfig, folder: Path | None) -> tuple[int, ...]:
    """Those that ``forecast_lengths`` may name, whatever the data; none where prompts stay whole.

    Raises:
        ConfigError: ``--max-length`` is beyond the model's context.
    """
    if folder is None or config.truncation != "keep_end":
        return ()
    max_length = resolve_max_length(folder, config.max_length)
    return tuple(_within({*_FORECAST_LENGTHS, max_length}, context_length(folder)))


def _within(lengths: set[int], context: int | None) -> list[int]:
    return sorted(lengths if context is None else {min(length, context) for length in lengths})


def estimate(
    facts: Facts,
    *,
    max_length: int,
    truncation: Truncation,
    parameters: int,
    pairs_per_shard: int,
    others: OtherPrompts | None = None,
) -> Estimate:
    """What scoring would take; equal sequences are scored once. ``others`` as that of ``kept_pairs``."""
    kept, _ = kept_pairs(facts.tokens, max_length=max_length, truncation=truncation, others=others)
    prompt, *completions = facts.tokens[kept, :3].T
    if truncation == "keep_start":
        completions = [np.minimum(completion, max_length - prompt) for completion in completions]
    else:
        prompt = np.minimum(prompt, max_length - np.maximum(*completions))
    # Of an unpaired row the prompt is scored with another row's completion too.
    chosen = np.where(facts.undesirable, ~facts.rejected, facts.chosen)
    rejected = np.where(facts.desirable, ~facts.chosen, facts.rejected)
    keys = [mixed_hash(facts.prompt[kept], side[kept]) for side in (chosen, rejected)]
    _, firsts = np.unique(np.concatenate(keys), return_index=True)
    tokens = int(np.concatenate([prompt + completion for completion in completions])[firsts].sum())
    stored = int((np.stack([prompt, *completions], axis=1) @ _BYTES).sum())
    return Estimate(
        sequences=len(firsts),
        tokens=tokens,
        max_length=max_length,
        shards=-(-facts.rows // pairs_per_shard),
        disk_gb=round(stored / 1e9, 4),
        parameters=parameters,
        gpu_hours=2 * parameters * tokens / _FLOPS / 3600,
        assumption="2 FLOPs per parameter and token, at 40% of an H100's 989 TFLOP/s in bf16; "
        "disk before compression",
    )
