"""Writes each pair's CHES score beside the shards: how much its gradient at first lowers its own chosen side.

The centered hidden embedding similarity of Razin et al. (arXiv 2410.08847) is of the model before training:

    CHES = <H+, H-> - ||H+||^2,    H = sum over a completion's tokens of the state that predicts the token

Normalised by length, every sum is a mean. The states are the last layer's, as the head reads them. So the
first one stands at the prompt's last token, and none at the completion's.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dpo_opt.optimize.forward.packing import pair_group
from dpo_opt.optimize.identity import require_same_model
from dpo_opt.optimize.transformers_scorer import HfScorer
from dpo_opt.schemas.fingerprint import MODEL_FIELDS
from dpo_opt.schemas.locations import AnyPath
from dpo_opt.schemas.models import find_model
from dpo_opt.schemas.pairs import counted_tokens
from dpo_opt.schemas.progress import Progress, Silent
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.sidecars import CHES, CHES_NORMALISED, new_column, write_column

Vector = npt.NDArray[np.float64]


class Ches(NamedTuple):
    """Of one pair: the higher, the sooner training lowers the log-prob of its chosen completion."""

    sums: float
    """As defined; it grows with the completions' lengths."""
    means: float
    """Normalised by length, by which the paper filters data."""


def ches(chosen: Vector, rejected: Vector, *, chosen_length: int, rejected_length: int) -> Ches:
    """Both CHES scores of a pair.

    Args:
        chosen: (d,) sum of the hidden states that predict the chosen completion's tokens.
        rejected: (d,) the same of the rejected one.
        chosen_length: How many states were added.
        rejected_length: The same of the rejected one.
    """
    mean = chosen / chosen_length
    # <a, b - a>, for <a, b> - <a, a> of nearly equal completions is a difference of large numbers.
    return Ches(float(chosen @ (rejected - chosen)), float(mean @ (rejected / rejected_length - mean)))


def write_ches(shards: AnyPath, *, model: str, progress: Progress | None = None) -> None:
    """Run the reference over every pair, and write ``columns/ches.parquet`` and ``ches_normalised.parquet``.

    The forward is training's own, in the dtype of the reference: prompts are computed once per pair. Columns
    of an earlier pass are replaced; a pass that ends early leaves none.

    Args:
        shards: A finalized folder of pairs; their token ids are read as they are.
        model: The reference.
        progress: Advances with every pair.

    Raises:
        ConfigError: There is no such model.
        DataError: The shards are incomplete or damaged.
        FingerprintError: The model is not the one that scored the shards.
    """
    progress = progress or Silent()
    folder = ShardFolder.open(shards)
    model_folder = find_model(model)
    require_same_model(
        folder, model_folder, fields=MODEL_FIELDS, fix="pass the reference that scored the shards"
    )
    reference = folder.manifest.fingerprint
    scorer = HfScorer(model_folder, dtype=reference.dtype, max_length=reference.max_length)
    sums, means = new_column(), new_column()
    progress.start("hidden states", total=folder.manifest.kept, unit="pairs")
    for shard in folder.manifest.shards:
        for pairs in folder.row_groups(shard.shard):
            states = scorer.state_sums([sequence for pair in pairs for sequence in pair_group(pair)])
            for pair, chosen, rejected in zip(pairs, states[0::2], states[1::2], strict=True):
                found = ches(
                    chosen,
                    rejected,
                    chosen_length=counted_tokens(pair.chosen_ids, pair.chosen_mask),
                    rejected_length=counted_tokens(pair.rejected_ids, pair.rejected_mask),
                )
                for column, value in ((sums, found.sums), (means, found.means)):
                    column.rows.append(pair.row)
                    column.values.append(value)
            progress.advance(len(pairs))
    write_column(shards, CHES, sums)
    write_column(shards, CHES_NORMALISED, means)
    progress.finish()
