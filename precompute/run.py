"""Score a dataset: for each shard that is not committed yet, tokenize, score, write, read back, commit.

A job killed at any moment loses at most the shard it was working on, and leaves nothing that a reader
would take for a result.
"""

import contextlib
import secrets
import socket
import time
from collections import Counter
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.engine.failing_sequences import ENGINE_ERROR, Losses, score_or_leave_out
from dpo_opt.precompute.read.datasets import BadRow, Row
from dpo_opt.precompute.read.row_reader import RowReader
from dpo_opt.precompute.shards.finalize import committed, finalize, is_finalized, withdraw_if_lost
from dpo_opt.precompute.shards.plan import RowsDigest
from dpo_opt.precompute.shards.reference import make_tokenizer, pinned, resolve_reference
from dpo_opt.precompute.shards.write_plan import settle_plan
from dpo_opt.precompute.tokens.tokenize import PairTokenizer
from dpo_opt.precompute.workers.assignment import Worker, shards_for
from dpo_opt.schemas.errors import DataError, DpoOptError
from dpo_opt.schemas.fingerprint import Fingerprint
from dpo_opt.schemas.locations import AnyPath, on_this_machine, sizes
from dpo_opt.schemas.manifest import (
    ATTEMPT,
    COMMITS,
    DATA,
    DROPPED,
    Manifest,
    Plan,
    ShardCommit,
    ShardRange,
    to_json,
)
from dpo_opt.schemas.pairs import LogpArray, PreferencePair, ScoredPair, Scorer, TokenizedPair, TokenSequence
from dpo_opt.schemas.progress import Progress, Silent
from dpo_opt.schemas.shards import DroppedRow, read_row_groups, write_dropped, write_shard
from dpo_opt.schemas.storage import sha256_file, write_text

# A log-prob may exceed 0 by rounding of log_softmax in half precision, and by no more.
_ABOVE_ZERO = 1e-3


def precompute(config: PrecomputeConfig, *, scorer: Scorer, progress: Progress | None = None) -> Manifest:
    """Score every pair once under the reference, and finalize the folder.

    Args:
        config: What to score, and where to; as one of several workers only its part, then whatever is left.
        scorer: The reference; its model must be ``config.model``.
        progress: Told of every scored pair.

    Raises:
        ConfigError: The model cannot be used.
        DataError: The data is malformed, or nothing is left of it.
        FingerprintError: The folder holds something else.
        DpoOptError: The scorer returned values that cannot be log-probs.
    """
    _, plan = _score_what_is_left(config, scorer, progress or Silent())
    return finalize(config.shards, own=plan)


def work(config: PrecomputeConfig, *, scorer: Scorer, progress: Progress | None = None) -> int:
    """Score the shards that nobody has committed yet, and leave the folder to ``finalize``.

    One worker of several starts with its own share; it plans where nobody has, and follows a plan that is
    there.

    Returns:
        How many shards it scored.

    Raises:
        ConfigError, DataError, FingerprintError, DpoOptError: As ``precompute``.
    """
    scored, _ = _score_what_is_left(config, scorer, progress or Silent())
    return scored


def _score_what_is_left(config: PrecomputeConfig, scorer: Scorer, progress: Progress) -> tuple[int, Plan]:
    """How many shards were scored here, and of which plan."""
    reference = resolve_reference(config)
    config = pinned(config, reference)
    tokenizer = make_tokenizer(config, reference)
    plan = settle_plan(config, reference=reference, tokenizer=tokenizer, numerics=scorer.numerics)
    if is_finalized(config.shards, plan):
        return 0, plan
    tokenizer = tokenizer.on(plan.fingerprint.template_date)
    worker = Worker(config.worker_index or 0, config.num_workers or 1)
    done = committed(config.shards, plan)
    job = _Job(progress, config.shards, plan, done)
    lost = sum(commit.dropped.get(ENGINE_ERROR, 0) for commit in done.values())
    losses = Losses(rows=plan.used, seen=lost + sum(commit.rows for commit in done.values()), lost=lost)
    reader = RowReader(config)
    scored = 0
    # Closed whatever happens: others need not wait for the shard that this worker was at.
    with contextlib.closing(shards_for(worker, plan, config.shards, progress=progress)) as shards:
        for shard in shards:
            commit = score_shard(
                config,
                plan,
                shard,
                reader.rows(shard.start, shard.stop),
                tokenizer=tokenizer,
                scorer=scorer,
                model=reference.folder,
                losses=losses,
            )
            last = "was another's first" if commit is None else f"has {commit.tokens} tokens"
            job.look(f"the last shard {last}")
            scored += 1
    job.look("")
    progress.finish()
    if losses.lost:
        progress.say(
            f"{losses.lost} pairs were left out because the engine failed on them ({ENGINE_ERROR}); "
            f"{DROPPED}/*.parquet says which, and what it said"
        )
    return scored, plan


class _Job:
    """Counts the rows of the whole folder, whoever scores them: a worker's own do not tell the time left."""

    def __init__(self, progress: Progress, shards_dir: AnyPath, plan: Plan, done: Collection[int]) -> None:
        self._progress = progress
        self._commits = shards_dir / COMMITS
        self._left = {p.shard: p.used for p in plan.shards if p.shard not in done}
        # Some of these do not count, or their shards would be done.
        self._before = sizes(self._commits)
        progress.start("scoring", total=plan.used, unit="pairs", done=plan.used - sum(self._left.values()))

    def look(self, note: str) -> None:
        """Tell of what was committed since the last look."""
        names = filter(ATTEMPT.fullmatch, sizes(self._commits).keys() - self._before.keys())
        shards = {int(name.partition("-")[0]) for name in names} & self._left.keys()
        if shards:
            self._progress.advance(sum(self._left.pop(shard) for shard in shards), note)


def score_shard(
    config: PrecomputeConfig,
    plan: Plan,
    planned: ShardRange,
    items: Sequence[Row],
    *,
    tokenizer: PairTokenizer,
    scorer: Scorer,
    model: Path,
    losses: Losses,
) -> ShardCommit | None:
    """Score one shard's rows and commit them; None where another attempt was in a manifest before.

    Args:
        config: Of the run.
        plan: Of the folder.
        planned: The shard.
        items: Its rows, in order.
        tokenizer: Of the reference, on the plan's date.
        scorer: The reference.
        model: Its folder.
        losses: What the folder lost to the engine before; this shard's losses are added.

    Raises:
        ConfigError: The model's weights are not finite.
        DataError: The rows are not those that were planned.
        EngineStopped: The engine fails too often.
        DpoOptError: The scorer returned values that cannot be log-probs.
    """
    begun = time.monotonic()
    kept: list[TokenizedPair] = []
    dropped: list[DroppedRow] = []
    digest = RowsDigest()
    pairs: list[PreferencePair] = []
    for item in items:
        digest.add(item)
        if isinstance(item, BadRow):
            dropped.append(_left_out(item.row, item.error, config))
        elif isinstance(item, PreferencePair):
            pairs.append(item)
    for pair, ids in zip(pairs, tokenizer.encode(pairs), strict=True):
        fitted = _left_out(pair.row, ids, config) if isinstance(ids, DataError) else tokenizer.fit(pair, ids)
        if isinstance(fitted, TokenizedPair):
            kept.append(fitted)
        else:
            dropped.append(fitted)
    if not digest.is_that_of(planned):
        raise DataError(
            f"rows {planned.start} to {planned.stop} changed while the file was being scored",
            where=", ".join(config.data),
            why="the shards of one folder would hold two versions of the data",
            fix="restore the file and run the same command again, or pass another --shards folder",
        )
    scored = score_pairs(kept, scorer, model=model)
    losses.add(kept, scored.left_out)
    where = {pair.row: pair for pair in pairs}
    for row, message in scored.left_out.items():
        pair = where[row]
        dropped.append(DroppedRow(row, pair.source, ENGINE_ERROR, f"{pair.where}: {message}"))
    dropped.sort(key=lambda row: row.row)
    return _commit(config, plan.fingerprint, planned, scored, dropped, begun)


def _left_out(row: int, error: DataError, config: PrecomputeConfig) -> DroppedRow:
    """A row that cannot be used, as it is listed.

    Raises:
        DataError: Bad rows are to stop the run.
    """
    if config.on_bad_row == "error":
        raise error
    return DroppedRow(row, None, f"bad_row:{error.kind}", error.where or "")


class ScoredPairs(NamedTuple):
    """What became of some pairs."""

    pairs: list[ScoredPair]
    """In order, without those that were left out."""
    left_out: dict[int, str]
    """Row to what the engine said of one of its sequences."""
    unique_sequences: int
    """Sequences that were scored."""


def score_pairs(pairs: Sequence[TokenizedPair], scorer: Scorer, *, model: Path | None = None) -> ScoredPairs:
    """Score pairs, equal sequences once; pairs whose sequences break the engine are left out.

    Args:
        pairs: Their rows are unique.
        scorer: The reference.
        model: Its folder, where its weights may be read to explain values that are not finite.

    Raises:
        ConfigError: The model's weights are not finite.
        EngineStopped: The engine fails whatever it is asked, or too often (``quarantine``).
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
                ref_chosen_token_logps=chosen,
                ref_rejected_token_logps=rejected,
            )
        )
    return ScoredPairs(scored, left_out, len(sequences) - len(messages))


def _require_logps(values: LogpArray, length: int, row: int, *, dtype: str) -> None:
    if len(values) == length and bool(np.isfinite(values).all()) and float(values.max()) <= _ABOVE_ZERO:
        return
    not_finite = int((~np.isfinite(values)).sum())
    if not_finite and dtype == "float16":
        raise DpoOptError(
            f"{not_finite} of {len(values)} log-probs are not finite in float16",
            where=f"source row {row}",
            why="values inside the model are beyond 65504, the largest number of that dtype",
            fix="pass --dtype bfloat16 or float32, and another --shards folder",
        )
    raise DpoOptError(
        f"the scorer returned values that are no log-probs ({len(values)} for {length} tokens, "
        f"largest {float(np.max(values, initial=-np.inf)):g}, "
        f"{not_finite} not finite)",
        where=f"source row {row}",
        why="training on them would be silently wrong; nothing of this shard was kept",
        fix="check the model with `dpo-opt precompute --backend hf --dtype float32` on a few rows",
    )


def _commit(
    config: PrecomputeConfig,
    fingerprint: Fingerprint,
    planned: ShardRange,
    result: ScoredPairs,
    dropped: Sequence[DroppedRow],
    begun: float,
) -> ShardCommit | None:
    """Data first, read back from disk, commit last; nothing of it stays where another attempt was first."""
    shards_dir, scored = config.shards, result.pairs
    attempt = secrets.token_hex(4)
    name = f"{planned.shard:05d}-{attempt}"
    data, left_out = f"{DATA}/{name}.parquet", f"{DROPPED}/{name}.parquet"
    write_shard(shards_dir / data, scored, fingerprint=fingerprint, shard=planned.shard)
    write_dropped(shards_dir / left_out, dropped)
    try:
        with on_this_machine(shards_dir / data) as file:
            on_disk = [pair.pair_id for group in read_row_groups(file) for pair in group]
            size, sha256 = file.stat().st_size, sha256_file(file)
        dropped_sha256 = sha256_file(shards_dir / left_out)
    except (DataError, FileNotFoundError):
        # Whoever finalizes removes what is not chosen.
        if withdraw_if_lost(shards_dir, planned.shard, attempt):
            return None
        raise
    if on_disk != [p.pair_id for p in scored]:
        raise DpoOptError("the shard read back from disk is not what was written", where=data)
    commit = ShardCommit(
        **planned.model_dump(),
        attempt=attempt,
        file=data,
        rows=len(scored),
        bytes=size,
        sha256=sha256,
        dropped_file=left_out,
        dropped_sha256=dropped_sha256,
        dropped=dict(sorted(Counter(row.reason for row in dropped).items())),
        truncated=sum(p.chosen_truncated or p.rejected_truncated for p in scored),
        tokens=sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in scored),
        unique_sequences=result.unique_sequences,
        fingerprint=fingerprint,
        host=socket.gethostname(),
        worker=config.worker_index,
        finished=datetime.now(UTC),
        seconds=time.monotonic() - begun,
    )
    write_text(shards_dir / COMMITS / f"{name}.json", to_json(commit))
    return None if withdraw_if_lost(shards_dir, planned.shard, attempt) else commit
