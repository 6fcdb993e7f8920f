"""Scores the pairs of a shard: equal sequences once, and every value is checked before it is kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpo_opt.precompute.engine.failing_sequences import score_or_leave_out
from dpo_opt.schemas.counts import are, counted
from dpo_opt.schemas.errors import DpoOptError
from dpo_opt.schemas.pairs import HIGHEST_LOGP, LogpArray, ScoredPair, Scorer, TokenizedPair, TokenSequence


class ScoredPairs(NamedTuple):
    """The result of scoring some pairs."""

    pairs: list[ScoredPair]
    """The scored pairs in order, without those that were left out."""
    left_out: dict[int, str]
    """From each row that was left out to the engine's error."""
    unique_sequences: int
    """Number of sequences that were scored."""


def score_pairs(pairs: Sequence[TokenizedPair], scorer: Scorer, *, model: Path | None = None) -> ScoredPairs:
    """Score pairs, equal sequences once. Pairs whose sequences break the engine are left out.

    Args:
        pairs: Pairs with different row numbers.
        scorer: The reference.
        model: The reference's folder; its weights are read to explain log-probs that are not finite.

    Raises:
        ConfigError: The model's weights are not finite.
        EngineStopped: The engine fails on every sequence, or too often (``failing_sequences``).
        DpoOptError: An answer is missing, has the wrong length, is not finite, or is above 0.
    """
    # Completions of one prompt next to each other, so that the scorer can reuse the prompt's work.
    by_prompt: dict[bytes, dict[tuple[bytes, bytes], TokenSequence]] = {}
    for pair in pairs:
        for completion in (pair.chosen_ids, pair.rejected_ids):
            sequence = TokenSequence(pair.prompt_ids, completion)
            by_prompt.setdefault(sequence.key[0], {})[sequence.key] = sequence
    sequences = {key: s for group in by_prompt.values() for key, s in group.items()}
    answers = score_or_leave_out(list(sequences.values()), scorer, model=model)
    values = dict(zip(sequences, answers.values, strict=True))
    messages = {key: answers.left_out[i] for i, key in enumerate(sequences) if i in answers.left_out}
    scored = []
    left_out: dict[int, str] = {}
    for pair in pairs:
        keys = [TokenSequence(pair.prompt_ids, ids).key for ids in (pair.chosen_ids, pair.rejected_ids)]
        chosen, rejected = (values[key] for key in keys)
        if chosen is None or rejected is None:
            left_out[pair.row] = next(messages[key] for key in keys if key in messages)
            continue
        for found, ids in ((chosen, pair.chosen_ids), (rejected, pair.rejected_ids)):
            _require_logps(found, len(ids), pair.row, dtype=scorer.numerics.dtype)
        scored.append(
            ScoredPair(
                row=pair.row,
                source=pair.source,
                prompt_ids=pair.prompt_ids,
                chosen_ids=pair.chosen_ids,
                rejected_ids=pair.rejected_ids,
                chosen_truncated=pair.chosen_truncated,
                rejected_truncated=pair.rejected_truncated,
                id=pair.id,
                chosen_mask=pair.chosen_mask,
                rejected_mask=pair.rejected_mask,
                label=pair.label,
                ref_chosen_token_logps=chosen,
                ref_rejected_token_logps=rejected,
            )
        )
    return ScoredPairs(scored, left_out, len(sequences) - len(messages))


def _require_logps(values: LogpArray, length: int, row: int, *, dtype: str) -> None:
    if len(values) == length and bool(np.isfinite(values).all()) and float(values.max()) <= HIGHEST_LOGP:
        return
    not_finite = int((~np.isfinite(values)).sum())
    if not_finite and dtype == "float16":
        raise DpoOptError(
            f"{not_finite} of {counted(len(values), 'log-prob')} {are(not_finite)} not finite in float16",
            where=f"source row {row}",
            why="values inside the model exceed 65504, the largest float16 number",
            fix="pass --dtype bfloat16 or float32, and another --shards folder",
        )
    raise DpoOptError(
        f"the scorer returned values that are not log-probs ({len(values)} for {counted(length, 'token')}, "
        f"largest {float(np.max(values, initial=-np.inf)):g}, "
        f"{not_finite} not finite)",
        where=f"source row {row}",
        why="training on them would be silently wrong; nothing of this shard was kept",
        fix="check the model with `dpo-opt precompute --backend hf --dtype float32` on a few rows",
    )
