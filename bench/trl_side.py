"""TRL's part in the training benches: its trainer on the same pairs in the same order, with a clock in it."""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Trained(NamedTuple):
    """What a run of TRL's trainer took, in seconds on this process's clock."""

    preparing: float
    """Tokenizing, and scoring the reference where it is precomputed."""
    began: float
    """When the first step did."""
    ends: list[float]
    """Of each step."""
    losses: list[float]


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
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    preparing, marks = [], []

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

        def _get_train_sampler(self, *args: Any) -> Any:
            return super()._get_train_sampler(*args) if order is None else Order()

    def _timed(work: Any, *args: Any) -> Any:
        began = time.perf_counter()
        result = work(*args)
        preparing.append(time.perf_counter() - began)
        return result

    config = DPOConfig(
        output_dir=str(output), per_device_train_batch_size=micro_batch, num_train_epochs=1,
        gradient_accumulation_steps=pairs_per_step // micro_batch, gradient_checkpointing=checkpointing,
        precompute_ref_log_probs=precompute, precompute_ref_batch_size=precompute_batch, learning_rate=1e-6,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, seed=0,
        use_cpu=True, bf16=False,
    )  # fmt: skip
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_json(str(pairs)),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[Clock()],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Trained(sum(preparing), marks[0], marks[1:], losses)


def write_pairs(source: Path, target: Path, count: int) -> None:
    """The first pairs of a file.

    Raises:
        SystemExit: It has fewer.
    """
    lines = source.read_text(encoding="utf-8").splitlines()[:count]
    if len(lines) < count:
        raise SystemExit(f"{source} has {len(lines)} pairs, {count} are needed")
    keys = ("prompt", "chosen", "rejected")
    rows = [{key: row[key] for key in keys} for row in map(json.loads, lines)]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
