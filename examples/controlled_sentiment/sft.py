"""Fine-tunes the reference of small and paper on whole reviews, with TRL's SFTTrainer."""

import json
import tempfile

from folders import Work
from libraries import FLOAT32_RUN

from dpo_opt.schemas.models import find_model
from dpo_opt.schemas.storage import publish_folder


def fine_tune(work: Work) -> None:
    """Write ``sft/``, unless it is there: the model after the reviews that the training prompts begin."""
    output = work.folder / "sft"
    if output.is_dir():
        return
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import SFTConfig, SFTTrainer

    settings = work.experiment.reviews
    assert settings is not None
    assert work.experiment.model is not None
    set_seed(0)
    lines = work.prompts("sft").read_text(encoding="utf-8").splitlines()
    folder = find_model(work.experiment.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with publish_folder(output) as private, tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model,
            args=SFTConfig(
                output_dir=scratch,
                num_train_epochs=settings.sft_epochs,
                per_device_train_batch_size=settings.sft_batch_size,
                learning_rate=settings.sft_learning_rate,
                max_length=settings.sft_max_tokens,
                seed=0,
                use_cpu=not torch.cuda.is_available(),
                **FLOAT32_RUN,
            ),
            train_dataset=Dataset.from_list(list(map(json.loads, lines))),
            processing_class=tokenizer,
        )
        trainer.train()
        # Not by the trainer, which would add its arguments as a pickle.
        model.save_pretrained(private)
        tokenizer.save_pretrained(private)
