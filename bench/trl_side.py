"""TRL's part in the training benches: its trainer on the same pairs in the same order, with a clock in it."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sides import Trained


def train(
    model: Path,
    pairs: Path,
    output: Path,
    *,
    order: Sequence[int] | None,
    pairs_per_step: int,
    micro_batch: int,
    checkpointing: bool,
    precompute: bool,
    precompute_batch: int | None = None,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Trained:
    """One epoch.

    Args:
        model: Folder of the policy and reference.
        pairs: JSON lines. TRL keeps what it scored of them under HF_HOME.
        output: A folder for TRL to write to.
        order: Rows in the order of training; None: TRL's own.
        pairs_per_step: Of each optimizer step.
        micro_batch: Pairs of each forward and backward.
        checkpointing: Whether activations are computed again in backward.
        precompute: Whether the reference's log-probs are computed beforehand.
        precompute_batch: Pairs scored at a time; None: as many as trained at a time.
        settings: Others of ``DPOConfig``; they win.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    preparing, marks, scored = [], [], []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

    class Order(torch.utils.data.Sampler[int]):
        def __len__(self) -> int:
            return len(order or ())

        def __iter__(self) -> Iterator[int]:
            return iter(order or ())

    class Trainer(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, *args: Any) -> Any:
            return _timed(super()._prepare_dataset, *args)

        def _precompute_ref_logps(self, *args: Any) -> Any:
            return _timed(super()._precompute_ref_logps, *args)

        def compute_ref_log_probs(self, *args: Any) -> Any:
            if not marks:
                scored.append(1)
            return super().compute_ref_log_probs(*args)

        def _get_train_sampler(self, *args: Any) -> Any:
            return super()._get_train_sampler(*args) if order is None else Order()

    def _timed(work: Any, *args: Any) -> Any:
        began = time.perf_counter()
        result = work(*args)
        preparing.append(time.perf_counter() - began)
        return result

    chosen: dict[str, Any] = {
        "output_dir": str(output), "per_device_train_batch_size": micro_batch, "num_train_epochs": 1,
        "gradient_accumulation_steps": pairs_per_step // micro_batch,
        "gradient_checkpointing": checkpointing, "precompute_ref_log_probs": precompute,
        "precompute_ref_batch_size": precompute_batch, "learning_rate": 1e-6, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 0, "use_cpu": True,
        "bf16": False,
    }  # fmt: skip
    config = DPOConfig(**{**chosen, **settings})
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_json(str(pairs)),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[Clock()],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Trained(sum(preparing), marks[0], marks[1:], losses, len(scored))
