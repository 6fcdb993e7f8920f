"""The learned reward: a Bradley-Terry model of a seed's pairs, trained by TRL's RewardTrainer."""

import tempfile
from pathlib import Path

from folders import Work
from libraries import FLOAT32_RUN

from dpo_opt.schemas.models import find_model
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.storage import publish_folder


def train_reward_model(work: Work, seed: int) -> None:
    """Write ``reward_model/`` of a seed, unless it is there: a classifier with one label.

    It begins with the reference's weights and a new head, and reads the ids that DPO is trained on.
    """
    output = work.of_seed(seed) / "reward_model"
    if output.is_dir():
        return
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
    from trl import RewardConfig, RewardTrainer

    print(f"$ reward model of seed {seed}", flush=True)
    set_seed(seed)
    settings = work.experiment.reward_model
    folder = find_model(work.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    with publish_folder(output) as private, tempfile.TemporaryDirectory() as scratch:
        trainer = RewardTrainer(
            model,
            args=RewardConfig(
                output_dir=scratch,
                num_train_epochs=settings.epochs,
                per_device_train_batch_size=settings.batch_size,
                learning_rate=settings.learning_rate,
                max_length=None,
                seed=seed,
                use_cpu=not torch.cuda.is_available(),
                **FLOAT32_RUN,
            ),
            train_dataset=Dataset.from_list(_pairs(work.of_seed(seed) / "shards")),
            processing_class=tokenizer,
        )
        trainer.train()
        # Not by the trainer, which would add its arguments as a pickle.
        model.save_pretrained(private)
        tokenizer.save_pretrained(private)


def _pairs(shards: Path) -> list[dict[str, list[int]]]:
    return [
        {
            "chosen_ids": [*map(int, pair.prompt_ids), *map(int, pair.chosen_ids)],
            "rejected_ids": [*map(int, pair.prompt_ids), *map(int, pair.rejected_ids)],
        }
        for pair in ShardFolder.open(shards).pairs()
    ]
