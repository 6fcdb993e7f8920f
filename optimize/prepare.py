"""What is checked before a run begins: that shards, model, adapter and evaluations belong together."""

import math
from pathlib import Path
from typing import NamedTuple

from dpo_opt.optimize.adapters.lora import require_usable
from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.evaluation import Evaluation, evaluations
from dpo_opt.optimize.identity import require_same_model
from dpo_opt.optimize.run_folder import RunFolder
from dpo_opt.optimize.stream import PairStream
from dpo_opt.schemas.errors import ConfigError, quoted
from dpo_opt.schemas.fingerprint import MODEL_FIELDS, TOKENIZER_FIELDS
from dpo_opt.schemas.models import find_model
from dpo_opt.schemas.shard_folder import ShardFolder


class Prepared(NamedTuple):
    """Everything that was checked before anything is written."""

    folder: ShardFolder
    model_folder: Path
    stream: PairStream
    total_steps: int
    evaluations: list[Evaluation]


def prepare(config: TrainConfig) -> Prepared:
    """Check a configuration against its shards and model; no weights are loaded.

    Raises:
        ConfigError: The output folder is used, or there is nothing to train on.
        DataError: The shards are incomplete or damaged.
        FingerprintError: The shards were scored with another model or tokenizer.
    """
    if not config.resume:
        RunFolder.require_unused(config.output_dir)
    folder = ShardFolder.open(config.shards)
    model_folder = find_model(config.model)
    require_usable(config)
    # Also when a run goes on: the reference must be the model it started from, never what was trained since.
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
    stream = PairStream(folder, eval_split=config.eval_split)
    if stream.train_size == 0:
        raise ConfigError(
            f"--eval-split {config.eval_split} holds out every pair", fix="pass a smaller share"
        )
    steps_per_epoch = math.ceil(stream.train_size / config.batch_size)
    total_steps = config.max_steps or steps_per_epoch * config.num_train_epochs
    return Prepared(folder, model_folder, stream, total_steps, evaluations(config, folder, stream))
