"""The training loop, flat from top to bottom: pairs, log-probs, loss, gradients, update, metrics.

Only the policy is in memory. The reference comes from the shards, as two numbers per pair.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from torch import Tensor

from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.export import save_final
from dpo_opt.optimize.identity import require_same_model
from dpo_opt.optimize.loss import PreferenceLoss, preference_loss
from dpo_opt.optimize.optimizer import learning_rate, make_optimizer
from dpo_opt.optimize.packing import pair_group
from dpo_opt.optimize.parity import PARITY_PAIRS, Parity, measure_parity, require_parity, spread_pairs
from dpo_opt.optimize.policy import Policy, compute_dtype, default_device, load_policy
from dpo_opt.optimize.run_folder import Metrics, RunFolder
from dpo_opt.optimize.stream import PairStream, Positions
from dpo_opt.schemas.errors import ConfigError, DpoOptError
from dpo_opt.schemas.fingerprint import MODEL_FIELDS, TOKENIZER_FIELDS
from dpo_opt.schemas.manifest import ShardFolder
from dpo_opt.schemas.models import checkpoint_dtype, find_model
from dpo_opt.schemas.pair_logps import PairLogps, Phase
from dpo_opt.schemas.pairs import ScoredPair
from dpo_opt.schemas.progress import Progress, Silent


class TrainResult(NamedTuple):
    """Where a run ended."""

    final: Path
    steps: int
    parity: Parity | None
    """None where the reference differs on purpose."""
    last_metrics: Metrics


class Prepared(NamedTuple):
    """Everything that was checked before anything is written."""

    folder: ShardFolder
    model_folder: Path
    stream: PairStream
    total_steps: int


class _PairResults(NamedTuple):
    """What one micro-batch leaves behind, detached, on the device: all (pairs,)."""

    losses: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def prepare(config: TrainConfig) -> Prepared:
    """Check a configuration against its shards and model; no weights are loaded.

    Raises:
        ConfigError: The output folder is used, or there is nothing to train on.
        DataError: The shards are incomplete or damaged.
        FingerprintError: The shards were scored with another model or tokenizer.
    """
    RunFolder.require_unused(config.output_dir)
    folder = ShardFolder.open(config.shards)
    model_folder = find_model(config.model)
    require_same_model(
        folder,
        model_folder,
        fields=TOKENIZER_FIELDS if config.reference_differs else MODEL_FIELDS,
        fix=f"pass the model that was scored as --model, or `dpo-opt precompute --model {config.model}` "
        "into another --shards folder",
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
    return Prepared(folder, model_folder, stream, total_steps)


def train(config: TrainConfig, *, progress: Progress | None = None) -> TrainResult:
    """Train a policy on cached reference log-probs.

    Writes ``config.output_dir``: metrics, per-pair log-probs, ``final/`` in the Hugging Face layout.

    Raises:
        DpoOptError: See ``prepare``; also when the cached log-probs are not the policy's own, or a loss or
            gradient is not finite.
    """
    progress = progress or Silent()
    folder, model_folder, stream, total_steps = prepare(config)
    torch.manual_seed(config.seed)
    device = default_device()
    policy = load_policy(
        model_folder, dtype=compute_dtype(config.dtype, device), device=device, trainable=True
    )
    parity = None
    if not config.reference_differs:
        cached_dtype = folder.manifest.fingerprint.dtype
        parity = measure_parity(policy, spread_pairs(folder, PARITY_PAIRS), cached_dtype=cached_dtype)
        require_parity(parity, shards=str(config.shards), model=config.model)

    run = RunFolder(config.output_dir)
    run.create(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    if parity is not None:
        run.write_parity(parity._asdict())
    optimizer = make_optimizer(policy.model, config)
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    progress.start("training", total=total_steps, unit="steps")

    step = consumed = num_tokens = num_unique_tokens = epoch = 0
    window: list[_PairResults] = []
    grad_norms: list[Tensor] = []
    window_start = time.perf_counter()
    last_metrics: Metrics = {}
    while step < total_steps:
        order = stream.epoch(seed=config.seed, epoch=epoch)
        for pairs in stream.batches(order, config.batch_size):
            rate = learning_rate(step, total_steps=total_steps, config=config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            results = _forward_pairs(policy, pairs, config, weights=stream.weights(pairs), backward=True)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            _require_finite(results.losses, grad_norm, pairs, step=step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            run.add_pair_logps(
                _rows(pairs, results, step=step, epoch=consumed / stream.train_size, phase="train")
            )
            step += 1
            consumed += len(pairs)
            num_tokens += sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
            num_unique_tokens += sum(
                len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs
            )
            window.append(results)
            grad_norms.append(grad_norm)
            position = {"step": step, "epoch": round(consumed / stream.train_size, 6)}
            if step % config.logging_steps == 0 or step == total_steps:
                seconds = time.perf_counter() - window_start
                counted = sum(len(r.losses) for r in window)
                last_metrics = {
                    **position,
                    **_means(window, prefix=""),
                    "learning_rate": rate,
                    "grad_norm": float(torch.stack(grad_norms).mean()),
                    "num_tokens": num_tokens,
                    "num_unique_tokens": num_unique_tokens,
                    "pairs_per_second": counted / seconds,
                }
                run.log(last_metrics)
                window, grad_norms, window_start = [], [], time.perf_counter()
            note = f"loss {last_metrics['loss']:.4f}" if last_metrics else ""
            progress.advance(1, note)
            evaluates = step == total_steps or (config.eval_steps and step % config.eval_steps == 0)
            if evaluates and len(stream.eval_positions):
                paused = time.perf_counter()
                means = _evaluate(
                    policy, stream, stream.eval_positions, config, run, step=step, epoch=position["epoch"]
                )
                run.log({**position, **means})
                window_start += time.perf_counter() - paused
            if step == total_steps:
                break
        epoch += 1
    progress.finish()

    run.finish(
        step=step,
        epoch=consumed / stream.train_size,
        total_steps=total_steps,
        num_train_epochs=config.num_train_epochs,
    )
    final = config.output_dir / "final"
    save_dtype = checkpoint_dtype(model_folder) if config.save_dtype == "auto" else config.save_dtype
    with folder.tokenizer() as tokenizer_dir:
        save_final(
            policy,
            final,
            source=model_folder,
            dtype=getattr(torch, save_dtype),
            tokenizer_dir=tokenizer_dir,
            card=_model_card(config, folder, parity, step),
        )
    return TrainResult(final, step, parity, last_metrics)


def _forward_pairs(
    policy: Policy,
    pairs: Sequence[ScoredPair],
    config: TrainConfig,
    *,
    weights: Sequence[float] | None,
    backward: bool,
) -> _PairResults:
    """Losses of a step's pairs, micro-batch by micro-batch; gradients add up over all of them.

    The loss is the weighted sum over the step's pairs divided by their number, however they are batched.
    """
    groups = [pair_group(pair) for pair in pairs]
    bins = policy.bins(groups, config.micro_batch_tokens)
    parts: list[_PairResults] = []
    for chosen in bins:
        batch = policy.layout([groups[i] for i in chosen]).to(policy.device)
        logps = policy.batch_logps(batch)
        owners = torch.repeat_interleave(torch.tensor(batch.lengths, device=logps.device))
        # float64: a margin is a small difference of sums over hundreds of tokens.
        sums = logps.new_zeros(2 * len(chosen), dtype=torch.float64).index_add(0, owners, logps.double())
        loss = _loss(sums, [pairs[i] for i in chosen], config)
        losses = loss.losses
        if weights is not None:
            losses = losses * torch.tensor([weights[i] for i in chosen], device=losses.device)
        if backward:
            torch.autograd.backward(losses.sum() / len(pairs))
        detached = sums.detach()
        parts.append(
            _PairResults(
                losses.detach(),
                detached[0::2],
                detached[1::2],
                loss.chosen_rewards,
                loss.rejected_rewards,
            )
        )
    # Back from packing order to the order of the pairs.
    back = torch.tensor([i for chosen in bins for i in chosen]).argsort()
    columns = (torch.cat(column)[back] for column in zip(*parts, strict=True))
    return _PairResults(*columns)


def _loss(sums: Tensor, pairs: Sequence[ScoredPair], config: TrainConfig) -> PreferenceLoss:
    def reference(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=sums.device)

    return preference_loss(
        loss_type=config.loss_type,
        chosen_logps=sums[0::2],
        rejected_logps=sums[1::2],
        ref_chosen_logps=reference([p.ref_chosen_logps for p in pairs]),
        ref_rejected_logps=reference([p.ref_rejected_logps for p in pairs]),
        beta=config.beta,
        label_smoothing=config.label_smoothing,
    )


@torch.no_grad()
def _evaluate(
    policy: Policy,
    stream: PairStream,
    positions: Positions,
    config: TrainConfig,
    run: RunFolder,
    *,
    step: int,
    epoch: float,
) -> Metrics:
    window = []
    for pairs in stream.batches(positions, config.batch_size):
        results = _forward_pairs(policy, pairs, config, weights=None, backward=False)
        run.add_pair_logps(_rows(pairs, results, step=step, epoch=epoch, phase="eval"))
        window.append(results)
    return _means(window, prefix="eval_")


def _means(window: Sequence[_PairResults], *, prefix: str) -> Metrics:
    """Means over the pairs of a window, in TRL's metric names."""
    all_pairs = _PairResults(*(torch.cat(column) for column in zip(*window, strict=True)))
    margins = all_pairs.chosen_rewards - all_pairs.rejected_rewards
    values = {
        "loss": all_pairs.losses,
        "rewards/chosen": all_pairs.chosen_rewards,
        "rewards/rejected": all_pairs.rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).double(),
        "logps/chosen": all_pairs.chosen_logps,
        "logps/rejected": all_pairs.rejected_logps,
    }
    means = torch.stack([value.mean() for value in values.values()]).tolist()
    return {prefix + name: mean for name, mean in zip(values, means, strict=True)}


def _rows(
    pairs: Sequence[ScoredPair], results: _PairResults, *, step: int, epoch: float, phase: Phase
) -> list[PairLogps]:
    return [
        PairLogps(
            row=pair.row,
            pair_id=pair.pair_id,
            step=step,
            epoch=epoch,
            phase=phase,
            chosen_logps=chosen,
            rejected_logps=rejected,
            chosen_length=len(pair.chosen_ids),
            rejected_length=len(pair.rejected_ids),
        )
        for pair, chosen, rejected in zip(
            pairs, results.chosen_logps.tolist(), results.rejected_logps.tolist(), strict=True
        )
    ]


def _require_finite(losses: Tensor, grad_norm: Tensor, pairs: Sequence[ScoredPair], *, step: int) -> None:
    if bool(torch.isfinite(losses).all() & torch.isfinite(grad_norm)):
        return
    bad = [pair.row for pair, loss in zip(pairs, losses.tolist(), strict=True) if not math.isfinite(loss)]
    rows = ", ".join(map(str, bad or [pair.row for pair in pairs][:10]))
    raise DpoOptError(
        f"{'a loss' if bad else 'the gradient'} is not finite (source rows {rows})",
        where=f"step {step + 1}",
        why="the update would have destroyed the policy; it was not made",
        fix="lower --learning-rate, or use --dtype float32",
    )


def _model_card(config: TrainConfig, folder: ShardFolder, parity: Parity | None, steps: int) -> str:
    manifest = folder.manifest
    reference = (
        "another model than the starting policy (`--reference-differs`)"
        if parity is None
        else f"the starting policy (parity {parity.mean:+.1e} mean, {parity.sd:.1e} sd nats per token)"
    )
    return f"""---
library_name: transformers
tags: [dpo, preference-optimization, dpo-opt]
---

# {config.output_dir.name}

Direct Preference Optimization (Rafailov et al. 2023) of `{Path(config.model).name}` with dpo-opt.

| | |
|---|---|
| pairs | {manifest.kept} of {manifest.rows} source rows |
| dataset digest | `{manifest.dataset_digest}` |
| reference | {reference} |
| reference weights | `{manifest.fingerprint.weights}` |
| loss | {config.loss_type}, beta {config.beta}, label smoothing {config.label_smoothing} |
| optimizer | {config.optim}, peak learning rate {config.learning_rate}, {config.batch_size} pairs per step |
| steps | {steps} |
| seed | {config.seed} |
"""
