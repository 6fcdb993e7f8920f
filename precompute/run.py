"""Score a dataset: for each shard that is not committed yet, tokenize, score, write, read back, commit.

A job killed at any moment loses at most the shard it was working on, and leaves nothing that a reader
would take for a result.
"""

import contextlib
import time
from collections.abc import Collection, Sequence

from dpo_opt.precompute.check.first_pairs import odd_ends
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.engine.failing_sequences import ENGINE_ERROR, Losses
from dpo_opt.precompute.engine.score_pairs import score_pairs
from dpo_opt.precompute.read.datasets import BadRow, Row
from dpo_opt.precompute.read.row_reader import RowReader
from dpo_opt.precompute.shards.commits import committed, write_commit
from dpo_opt.precompute.shards.finalize import finalize
from dpo_opt.precompute.shards.finished import is_finalized
from dpo_opt.precompute.shards.planned_rows import RowsDigest
from dpo_opt.precompute.shards.reference import make_tokenizer, pinned, resolve_reference
from dpo_opt.precompute.shards.refused_plan import refusal_noted
from dpo_opt.precompute.shards.weights_memo import ScoringModel
from dpo_opt.precompute.shards.write_plan import settle_plan
from dpo_opt.precompute.tokens.mismatched import NO_OTHER_PROMPT, with_mismatched
from dpo_opt.precompute.tokens.tokenize import PairTokenizer
from dpo_opt.precompute.workers.assignment import Worker, shards_for
from dpo_opt.schemas.attempts import commit_names
from dpo_opt.schemas.counts import counted
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.locations import AnyPath, sizes
from dpo_opt.schemas.manifest import (
    COMMITS,
    DROPPED,
    Manifest,
    Plan,
    ShardCommit,
    ShardRange,
)
from dpo_opt.schemas.pairs import PreferencePair, Scorer, TokenizedPair
from dpo_opt.schemas.progress import Progress, Silent
from dpo_opt.schemas.shards import UNPAIRED, DroppedRow


def precompute(config: PrecomputeConfig, *, scorer: Scorer, progress: Progress | None = None) -> Manifest:
    """Score every pair once under the reference, and finalize the folder.

    Args:
        config: What to score, and into which folder. One of several workers scores its own slice of the
            shards first, then any that are left.
        scorer: The reference; its model must be ``config.model``.
        progress: Told of every shard that any worker has scored.

    Raises:
        ConfigError: The model cannot be used.
        DataError: The data is malformed, or nothing is left of it.
        FingerprintError: The folder holds something else.
        DpoOptError: The scorer returned values that cannot be log-probs.
    """
    _, plan = _score_what_is_left(config, scorer, progress or Silent())
    return finalize(config.shards, own=plan)


def work(config: PrecomputeConfig, *, scorer: Scorer, progress: Progress | None = None) -> int:
    """Score the shards that have no commit yet, and leave the folder to ``finalize``.

    If the folder has no plan yet, the worker makes one.

    Returns:
        How many shards it scored.

    Raises:
        ConfigError, DataError, FingerprintError, DpoOptError: As ``precompute``.
    """
    scored, _ = _score_what_is_left(config, scorer, progress or Silent())
    return scored


def _score_what_is_left(config: PrecomputeConfig, scorer: Scorer, progress: Progress) -> tuple[int, Plan]:
    """The number of shards that were scored here, and their plan."""
    reference = resolve_reference(config)
    model = ScoringModel(reference.folder)
    config = pinned(config, reference)
    tokenizer = make_tokenizer(config, reference)
    plan = settle_plan(config, reference=reference, tokenizer=tokenizer, numerics=scorer.numerics)
    if is_finalized(config.shards, plan):
        return 0, plan
    tokenizer = tokenizer.on(plan.fingerprint.template_date)
    if not config.worker_index:  # of several workers one says it
        for line in odd_ends(config, tokenizer, reference.folder):
            progress.say(line)
    worker = Worker(config.worker_index or 0, config.num_workers or 1)
    done = committed(config.shards, plan)
    job = _Job(progress, config.shards, plan, done)
    lost = sum(commit.dropped.get(ENGINE_ERROR, 0) for commit in done.values())
    losses = Losses(rows=plan.used, seen=lost + sum(commit.rows for commit in done.values()), lost=lost)
    reader = RowReader(config)
    scored = 0
    # Closed even on an error, so that other workers do not wait for the shard that this one was scoring.
    with (
        refusal_noted(config.shards, plan),
        contextlib.closing(shards_for(worker, plan, config.shards, progress=progress)) as shards,
    ):
        for shard in shards:
            commit = score_shard(
                config,
                plan,
                shard,
                reader.rows(shard.start, shard.stop),
                tokenizer=tokenizer,
                scorer=scorer,
                model=model,
                losses=losses,
            )
            last = "was another's first" if commit is None else f"has {counted(commit.tokens, 'token')}"
            job.look(f"the last shard {last}")
            scored += 1
    job.look("")
    progress.finish()
    if losses.lost:
        progress.say(
            f"left out because the engine failed on them: {losses.lost} ({ENGINE_ERROR}); "
            f"{DROPPED}/*.parquet says which, and what it said"
        )
    return scored, plan


class _Job:
    """Counts the rows that any worker scores: one worker's own rows do not tell the time left."""

    def __init__(self, progress: Progress, shards_dir: AnyPath, plan: Plan, done: Collection[int]) -> None:
        self._progress = progress
        self._commits = shards_dir / COMMITS
        self._left = {p.shard: p.used for p in plan.shards if p.shard not in done}
        # None of these counts for a shard that is left: they are commits of other plans, or damaged.
        self._before = sizes(self._commits)
        progress.start(
            "scoring",
            total=plan.used,
            unit=f"{plan.fingerprint.noun}s",
            done=plan.used - sum(self._left.values()),
        )

    def look(self, note: str) -> None:
        """Report the shards that were committed since the last call."""
        attempts = commit_names(sizes(self._commits).keys() - self._before.keys())
        shards = {attempt.shard for attempt in attempts.values()} & self._left.keys()
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
    model: ScoringModel,
    losses: Losses,
) -> ShardCommit | None:
    """Score one shard's rows and commit them; None if a manifest already names another attempt.

    Args:
        config: Of the run.
        plan: Of the folder.
        planned: The shard.
        items: Its rows, in order.
        tokenizer: Of the reference, on the plan's date.
        scorer: The reference.
        model: Its files.
        losses: Pairs of the folder that the engine failed on before; this shard's are added.

    Raises:
        ConfigError: The model's weights are not finite.
        DataError: The rows are not those that were planned.
        FingerprintError: The model's files changed since its fingerprint was taken.
        EngineStopped: The engine fails too often.
        DpoOptError: The scorer returned values that cannot be log-probs.
    """
    begun = time.monotonic()
    dropped: list[DroppedRow] = []
    pairs: list[PreferencePair] = []
    digest = RowsDigest()
    for item in items:
        digest.add(item)
        if isinstance(item, BadRow):
            dropped.append(_left_out(item.row, item.error, config))
        elif isinstance(item, PreferencePair):
            pairs.append(item)
    kept: list[TokenizedPair] = []
    prompts_cut: set[int] = set()
    for pair, ids in zip(pairs, tokenizer.encode(pairs), strict=True):
        if isinstance(ids, DataError):
            dropped.append(_left_out(pair.row, ids, config))
        elif isinstance(fitted := tokenizer.fit(pair, ids), DroppedRow):
            dropped.append(fitted)
        else:
            kept.append(fitted)
            if len(fitted.prompt_ids) < len(ids.prompt):
                prompts_cut.add(pair.row)
    if not digest.is_that_of(planned):
        raise DataError(
            f"rows {planned.start} to {planned.stop} changed while the file was being scored",
            where=", ".join(config.data),
            why="the shards of one folder would hold two versions of the data",
            fix="restore the file and run the same command again, or pass another --shards folder",
        )
    where = {pair.row: pair for pair in pairs}
    if plan.fingerprint.rows == UNPAIRED:
        kept, alone = with_mismatched(kept, max_length=plan.fingerprint.max_length)
        dropped += [DroppedRow(r.row, r.source, NO_OTHER_PROMPT, where[r.row].where) for r in alone]
    scored = score_pairs(kept, scorer, model=model.folder)
    # An engine loads it at its first sequences, and again when it had failed.
    model.require_unchanged(plan.fingerprint.weights)
    losses.add(kept, scored.left_out)
    for row, message in scored.left_out.items():
        pair = where[row]
        dropped.append(DroppedRow(row, pair.source, ENGINE_ERROR, f"{pair.where}: {message}"))
    dropped.sort(key=lambda row: row.row)
    return write_commit(
        config.shards,
        planned,
        scored,
        dropped,
        prompts_cut=prompts_cut,
        fingerprint=plan.fingerprint,
        worker=config.worker_index,
        begun=begun,
    )


def _left_out(row: int, error: DataError, config: PrecomputeConfig) -> DroppedRow:
    """The list entry of a row that cannot be used.

    Raises:
        DataError: The configuration says that bad rows stop the run.
    """
    if config.on_bad_row == "error":
        raise error
    return DroppedRow(row, None, f"bad_row:{error.kind}", error.where or "")
