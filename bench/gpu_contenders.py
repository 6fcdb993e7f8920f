"""Who competes in bench/gpu.py: dpo-opt's own step, a padded baseline in plain transformers, and TRL."""

import dataclasses
import importlib.util
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from gpu_tasks import END, PAD, WORDS, Task, make_model
from torch import Tensor

from dpo_opt.optimize import TrainConfig
from dpo_opt.optimize.forward.activations import checkpoint_activations
from dpo_opt.optimize.forward.attention import SEGMENT_ATTENTION
from dpo_opt.optimize.forward.balance import forward_cost
from dpo_opt.optimize.forward.packing import Batch, Group, pack, pair_group, plan_bins
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.processes.distributed import World
from dpo_opt.optimize.step import Batching, forward_pairs
from dpo_opt.optimize.stop_signals import StopSignals
from dpo_opt.optimize.update.optimizer import make_optimizer
from dpo_opt.schemas.pairs import ScoredPair, TokenizedPair


class Measured(NamedTuple):
    """One contender with one size of micro-batch."""

    micro_batch: str
    seconds: float
    """Median per step."""
    peak: float
    """Bytes allocated on the device at most; nan on a CPU."""
    first_loss: float


Contender = Callable[[Task, int], Measured]


class Unshared(Policy):
    """Packed like the real one, but every prompt is computed for chosen and for rejected."""

    @property
    def layout(self) -> Callable[[Sequence[Group]], Batch]:
        return lambda groups: pack([(sequence,) for group in groups for sequence in group])

    def bins(self, groups: Sequence[Group], budget: int) -> list[list[int]]:
        sizes = [sum(len(s.prompt_ids) + len(s.completion_ids) - 1 for s in group) for group in groups]
        return plan_bins(sizes, budget)


class Padded(Policy):
    """The baseline: padded rows, so many pairs at a time, and plain logits of the completion rows."""

    def bins(self, groups: Sequence[Group], budget: int) -> list[list[int]]:
        return [list(range(i, min(i + budget, len(groups)))) for i in range(0, len(groups), budget)]

    def batch_logps(self, batch: Batch, *, log_squares: Tensor | None = None) -> Tensor:
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            output = self.model.base_model(input_ids=batch.input_ids, use_cache=False, **batch.model_kwargs)
            hidden = output.last_hidden_state.flatten(0, 1)[batch.scored_rows]
            logits = self.model.get_output_embeddings()(hidden)
        logps = logits.float().log_softmax(-1).gather(1, batch.targets[:, None])
        return logps.squeeze(1)


def ours(policy_class: type[Policy], *, checkpointing: bool) -> Contender:
    """dpo-opt, so many rows at a time."""

    def run(task: Task, micro_tokens: int) -> Measured:
        model = make_model(task, SEGMENT_ATTENTION)
        policy = policy_class(model, task.device, task.dtype, packs=True)
        return _measure(policy, task, micro_tokens, f"{micro_tokens} tokens", checkpointing=checkpointing)

    return run


def padded(*, checkpointing: bool) -> Contender:
    """The plain baseline, so many pairs at a time."""

    def run(task: Task, micro_pairs: int) -> Measured:
        policy = Padded(make_model(task, _stock_attention(task)), task.device, task.dtype, packs=False)
        return _measure(policy, task, micro_pairs, f"{micro_pairs} pairs", checkpointing=checkpointing)

    return run


def _stock_attention(task: Task) -> str:
    flash = task.device.type == "cuda" and installed("flash_attn")
    return "flash_attention_2" if flash else "sdpa"


def _measure(policy: Policy, task: Task, budget: int, label: str, *, checkpointing: bool) -> Measured:
    """Train with dpo-opt's step, loss and optimizer; the policy decides how pairs become log-probs."""
    checkpoint_activations(policy.model, "full" if checkpointing else "none")
    steps = [_with_references(policy, pairs, budget) for pairs in task.steps]
    stored: Any = str(task.param_dtype).removeprefix("torch.")
    config = TrainConfig(
        shards="-", model="-", output_dir=Path("-"), batch_size=task.per_step, param_dtype=stored
    )
    optimizer = make_optimizer(policy.model, config)
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    batching = Batching(budget, forward_cost(policy), World(0, 1, 0, task.device, None))
    stop = StopSignals()
    marks, losses = [], []
    for step, pairs in enumerate(steps):
        if step == 1:
            _reset_peak(task.device)
            marks.append(now(task.device))
        results = forward_pairs(
            policy, pairs, config, batching=batching, weights=None, backward=True, stop=stop
        )
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(results.losses.mean())
        if step:
            marks.append(now(task.device))
    return _measured(label, marks, task.device, first_loss=float(losses[0]))


@torch.no_grad()
def _with_references(policy: Policy, pairs: list[TokenizedPair], budget: int) -> list[ScoredPair]:
    groups = [pair_group(pair) for pair in pairs]
    scored: dict[int, ScoredPair] = {}
    for chosen in policy.bins(groups, budget):
        logps = [part.cpu().numpy() for part in policy.sequence_logps([groups[i] for i in chosen])]
        for i, ours, theirs in zip(chosen, logps[0::2], logps[1::2], strict=True):
            values = {field.name: getattr(pairs[i], field.name) for field in dataclasses.fields(pairs[i])}
            scored[i] = ScoredPair(**values, ref_chosen_token_logps=ours, ref_rejected_token_logps=theirs)
    return [scored[i] for i in range(len(pairs))]


def liger(task: Task) -> bool:
    """Whether TRL's models get Liger's fused layers, which are Triton's and need a GPU."""
    return task.device.type == "cuda" and installed("liger_kernel")


def trl(*, checkpointing: bool, offloading: bool = False) -> Contender:
    """TRL's trainer with its own precomputed references, so many pairs at a time on average.

    Its fused head is always on. ``batch_rebalance`` puts pairs of like length side by side, and fewer where
    they are long. Kernels of the Hub, which it prefers to Liger's, would need a network.
    """

    def run(task: Task, micro_pairs: int) -> Measured:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        class Clock(transformers.TrainerCallback):
            def __init__(self) -> None:
                self.marks: list[float] = []

            def on_step_end(self, *_: Any, **__: Any) -> None:
                if not self.marks:
                    _reset_peak(task.device)
                self.marks.append(now(task.device))

        class Trainer(DPOTrainer):  # type: ignore[misc]
            def _get_train_sampler(self, *_: Any) -> Any:
                # TRL drops a column of lengths that the data brings, and the sampler looks for one.
                lengths = [
                    len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
                    for pair in task.pairs
                ]
                return super()._get_train_sampler(self.train_dataset.add_column("length", lengths))

        def text(ids: np.ndarray) -> str:
            return " ".join(f"w{i}" for i in ids.tolist())

        def row(pair: TokenizedPair) -> dict[str, str]:
            # The last token is the end of text, which TRL adds itself.
            completions = {"chosen": pair.chosen_ids[:-1], "rejected": pair.rejected_ids[:-1]}
            return {"prompt": text(pair.prompt_ids)} | {k: " " + text(ids) for k, ids in completions.items()}

        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            settings = DPOConfig(
                output_dir=folder, per_device_train_batch_size=micro_pairs, max_steps=len(task.steps),
                gradient_accumulation_steps=task.per_step // micro_pairs, optim="adamw_torch_fused",
                logging_steps=1, save_strategy="no", report_to=[], seed=0, learning_rate=1e-6,
                max_length=None, use_cpu=task.device.type == "cpu", bf16=task.dtype == torch.bfloat16,
                gradient_checkpointing=checkpointing, activation_offloading=offloading,
                precompute_ref_log_probs=True, disable_tqdm=True, use_liger_kernel=liger(task),
                train_sampling_strategy="batch_rebalance",
            )  # fmt: skip
            trainer = Trainer(
                model=make_model(task, _stock_attention(task)).train(), args=settings, callbacks=[clock],
                train_dataset=Dataset.from_list([row(pair) for pair in task.pairs]),
                processing_class=_tokenizer(),
            )  # fmt: skip
            trainer.remove_callback(transformers.PrinterCallback)  # its lines would stand in the table
            trainer.train()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return _measured(f"{micro_pairs} pairs", clock.marks, task.device, first_loss=losses[0])

    return run


def _tokenizer() -> Any:
    """One id per word: the same lengths for TRL, which takes text, as for the others."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<end>": END, "<pad>": PAD} | {f"w{i}": i for i in range(2, WORDS)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<pad>"
    )


def _measured(label: str, marks: list[float], device: torch.device, *, first_loss: float) -> Measured:
    seconds = statistics.median(b - a for a, b in itertools.pairwise(marks))
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else math.nan
    return Measured(label, seconds, peak, first_loss)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
