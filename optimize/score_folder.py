"""``dpo-opt score``: scores every pair of a shard folder under any checkpoint, as a table for analysis."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpo_opt.optimize.checkpoint.checkpoints import read_state
from dpo_opt.optimize.forward.packing import pair_group
from dpo_opt.optimize.identity import require_same_model
from dpo_opt.optimize.transformers_scorer import HfScorer
from dpo_opt.schemas.errors import DataError, first_line
from dpo_opt.schemas.fingerprint import TOKENIZER_FIELDS
from dpo_opt.schemas.locations import AnyPath
from dpo_opt.schemas.models import checkpoint_dtype, find_model
from dpo_opt.schemas.pair_logps import PairLogps, write_pair_logps
from dpo_opt.schemas.pairs import ScoredPair
from dpo_opt.schemas.plain_data import json_of
from dpo_opt.schemas.progress import Progress, Silent
from dpo_opt.schemas.run_layout import STATE, TRAIN_STATE
from dpo_opt.schemas.shard_folder import ShardFolder

_FIX = "copy it from the run again, or remove it to score without a step"


def score_shards(
    shards: AnyPath, *, model: str, output: Path, dtype: str, progress: Progress | None = None
) -> int:
    """Score every pair of a folder under a checkpoint and write the pair log-prob table.

    Args:
        shards: Folder of reference shards; their token ids are scored as they are.
        model: Any checkpoint with the same tokenizer.
        output: Parquet file to write: rows of phase ``score``, with token log-probs.
        dtype: Dtype of the model, or ``auto`` for the one that the reference was scored in, so that a
            difference of log-probs is not one of rounding. A model that was trained and saved in float32 is
            scored in that, as its run was: what it learned may be less than half precision can hold.
        progress: Advances with every scored pair.

    Returns:
        Number of pairs.

    Raises:
        ConfigError: There is no such model.
        DataError: The shards are incomplete or damaged.
        FingerprintError: The checkpoint's tokenizer is not that of the shards.
    """
    progress = progress or Silent()
    folder = ShardFolder.open(shards)
    model_folder = find_model(model)
    require_same_model(
        folder,
        model_folder,
        fields=TOKENIZER_FIELDS,
        fix="pass a checkpoint with the tokenizer of the shards",
    )
    reference = folder.manifest.fingerprint
    trained = _trained(model_folder)
    if dtype == "auto":
        whole = trained.dtype == checkpoint_dtype(model_folder) == "float32"
        dtype = "float32" if whole else reference.dtype
    scorer = HfScorer(model_folder, dtype=dtype, max_length=reference.max_length)
    progress.start("scoring", total=folder.manifest.kept, unit=f"{folder.manifest.fingerprint.noun}s")

    def batches() -> Iterator[list[PairLogps]]:
        for shard in folder.manifest.shards:
            for pairs in folder.row_groups(shard.shard):
                yield _score_pairs(scorer, pairs, trained, checkpoint=str(model))
                progress.advance(len(pairs))

    write_pair_logps(output, batches(), dtype=dtype)
    progress.finish()
    return folder.manifest.kept


class _Trained(NamedTuple):
    """Of the run that a model belongs to."""

    step: int = 0
    epoch: float = 0.0
    dtype: str = "float32"
    """That training computed in; float32 if there is no such run."""


def _trained(model_folder: Path) -> _Trained:
    """How far training had come: a checkpoint says it itself, and of the final model its run does."""
    run = model_folder.parent / STATE
    if (model_folder / TRAIN_STATE).is_file():
        state = read_state(model_folder, fix=_FIX)
        return _Trained(state.at.step, state.epoch, str(state.settings.get("dtype")))
    if not run.is_file():
        return _Trained()
    try:
        values = json_of(run.read_text(encoding="utf-8"))
        return _Trained(int(values["global_step"]), float(values["epoch"]), str(values.get("dtype")))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"not readable as the state of a run ({first_line(error)})",
            where=str(run),
            why="it says after how many steps the model was saved",
            fix=_FIX,
        ) from error


def _score_pairs(
    scorer: HfScorer, pairs: Sequence[ScoredPair], trained: _Trained, *, checkpoint: str
) -> list[PairLogps]:
    logps = scorer.token_logps([s for pair in pairs for s in pair_group(pair)])
    return [
        PairLogps(
            row=pair.row,
            pair_id=pair.pair_id,
            step=trained.step,
            epoch=trained.epoch,
            phase="score",
            checkpoint=checkpoint,
            chosen_logps=float(chosen.sum(dtype=np.float64)),
            rejected_logps=float(rejected.sum(dtype=np.float64)),
            chosen_length=len(chosen),
            rejected_length=len(rejected),
            chosen_token_logps=chosen,
            rejected_token_logps=rejected,
        )
        for pair, chosen, rejected in zip(pairs, logps[0::2], logps[1::2], strict=True)
    ]
