"""Checks before a run begins that shards, model, adapter and evaluation folders belong together."""

from pathlib import Path
from typing import NamedTuple

from dpo_opt.optimize.adapters.lora import require_usable
from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.evaluation import Evaluation, evaluations
from dpo_opt.optimize.identity import require_same_model
from dpo_opt.optimize.losses.usable import (
    reads_margins,
    require_matching_rows,
    require_no_weights,
    require_usable_losses,
)
from dpo_opt.optimize.reporting.trackers import require_installed
from dpo_opt.optimize.run_folder import RunFolder
from dpo_opt.optimize.stream import PairStream, share_that_holds_out
from dpo_opt.schemas.errors import ConfigError, quoted
from dpo_opt.schemas.fingerprint import MODEL_FIELDS, TOKENIZER_FIELDS
from dpo_opt.schemas.models import find_model
from dpo_opt.schemas.shard_folder import ShardFolder


class Prepared(NamedTuple):
    """What a run needs and was checked; nothing is written yet."""

    folder: ShardFolder
    model_folder: Path
    stream: PairStream
    total_steps: int
    evaluations: list[Evaluation]


def prepare(config: TrainConfig, *, compares_model: bool = True) -> Prepared:
    """Check a configuration against its shards and model; no weights are loaded.

    Args:
        config: Of the run.
        compares_model: False: this model was compared with these shards a moment ago.

    Raises:
        ConfigError: The output folder is in use, an option cannot work, or there is nothing to train on.
        DataError: The shards are incomplete or damaged.
        FingerprintError: The shards were scored with another model or tokenizer.
    """
    if not config.resume:
        RunFolder.require_unused(config.output_dir)
    require_usable_losses(config)
    require_installed(config.report_to)
    folder = ShardFolder.open(config.shards)
    require_matching_rows(config, rows=folder.manifest.fingerprint.rows, where=str(folder.path))
    model_folder = find_model(config.model)
    require_usable(config)
    # Also with --resume: the reference must be the model that the run started from, not a checkpoint of it.
    if compares_model:
        require_same_model(
            folder,
            model_folder,
            fields=TOKENIZER_FIELDS if config.reference_differs else MODEL_FIELDS,
            adapter=config.adapter,
            fix="pass the model that was scored as --model, or "
            f"`dpo-opt precompute --model {quoted(config.model)}` into another --shards folder",
        )
    with folder.tokenizer():
        pass  # better now than when the trained model is written
    stream = PairStream(
        folder,
        eval_split=config.eval_split,
        by_prompt=config.sample_by == "prompt",
        margins=reads_margins(config),
    )
    require_no_weights(config, weighted=stream.weighted, where=str(folder.path))
    if stream.train_size == 0:
        noun = folder.manifest.fingerprint.noun
        share = share_that_holds_out(folder.index(["prompt_id"])["prompt_id"])
        raise ConfigError(
            f"--eval-split {config.eval_split} holds out every {noun}",
            where=str(folder.path),
            why="nothing would be left to train on",
            fix=f"leave --eval-split out, and pass {noun}s of other prompts as --eval-shards"
            if share is None
            else f"pass a smaller share, such as --eval-split {share}",
        )
    total_steps = config.max_steps or stream.count_steps(
        seed=config.seed, size=config.batch_size, epochs=config.num_train_epochs
    )
    return Prepared(folder, model_folder, stream, total_steps, evaluations(config, folder, stream))
