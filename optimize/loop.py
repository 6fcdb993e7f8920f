"""The training loop, flat from top to bottom: pairs, log-probs, loss, gradients, update, metrics, checkpoint.

Only the policy is in memory. The reference comes from the shards, as two numbers per pair.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from torch import Tensor

from dpo_opt.optimize.budget import Device, choose_budget, longest_pair, run_device
from dpo_opt.optimize.checkpoints import (
    Counters,
    Data,
    TrainState,
    find_checkpoint,
    prune_checkpoints,
    require_same_run,
    save_checkpoint,
)
from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.distributed import (
    World,
    any_rank,
    clip_gradients,
    process_group,
    wait_for_all,
    world_from_environment,
)
from dpo_opt.optimize.evaluation import (
    Evaluation,
    evaluate,
    evaluations,
    is_better,
    is_comparable,
    new_best,
)
from dpo_opt.optimize.identity import require_same_model
from dpo_opt.optimize.lora import require_usable
from dpo_opt.optimize.memory import optimizer_bytes
from dpo_opt.optimize.optimizer import learning_rate, make_optimizer, set_learning_rate
from dpo_opt.optimize.packing import pair_group
from dpo_opt.optimize.parity import Parity
from dpo_opt.optimize.policy import Policy, compute_dtype
from dpo_opt.optimize.run_folder import FINAL, Metrics, RunFolder, Written, hold_logps, resume_command
from dpo_opt.optimize.saving import Saver
from dpo_opt.optimize.start import start
from dpo_opt.optimize.step import Batching, MetricsWindow, PairResults, forward_pairs
from dpo_opt.optimize.stop_signals import StopRequested, StopSignals, stop_signals
from dpo_opt.optimize.stream import PairStream
from dpo_opt.optimize.throughput import Throughput
from dpo_opt.schemas.errors import ConfigError, DpoOptError, Preempted, quoted
from dpo_opt.schemas.fingerprint import MODEL_FIELDS, TOKENIZER_FIELDS
from dpo_opt.schemas.manifest import ShardFolder
from dpo_opt.schemas.models import find_model
from dpo_opt.schemas.pairs import ScoredPair
from dpo_opt.schemas.progress import Progress, Silent


class TrainResult(NamedTuple):
    """Where a run ended."""

    final: Path
    steps: int
    parity: Parity | None
    """None where the reference differs on purpose, or the run had come to its end before."""
    last_metrics: Metrics


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


def train(config: TrainConfig, *, progress: Progress | None = None) -> TrainResult:
    """Train a policy on cached reference log-probs.

    Writes ``config.output_dir``: metrics, per-pair log-probs, checkpoints, and ``final/`` in the Hugging Face
    layout. SIGTERM and SIGUSR1 save a checkpoint and end the run.

    Raises:
        Preempted: A signal came; with ``resume`` the run goes on as if it had not.
        DpoOptError: See ``prepare``; also when the cached log-probs are not the policy's own, a loss or
            gradient is not finite, or no checkpoint to resume from is whole.
    """
    world = world_from_environment(os.environ)
    with stop_signals() as stop, process_group(world):
        return _train(config, (progress or Silent()) if world.first else Silent(), stop, world)


def _train(config: TrainConfig, progress: Progress, stop: StopSignals, world: World) -> TrainResult:
    folder, model_folder, stream, total_steps, evals = prepare(config)
    run = RunFolder(config.output_dir, writes=world.first)
    final = run.path / FINAL
    ended = run.finished_step()
    # Before the first process writes, the others have seen what was there.
    wait_for_all(world)
    if ended is not None and ended >= total_steps:
        progress.say(f"the run in {quoted(run.path)} came to its end before")
        return TrainResult(final, ended, None, run.last_metrics())
    data = Data(
        dataset_digest=folder.manifest.dataset_digest,
        index_sha256=folder.manifest.index_sha256,
        fingerprint=folder.manifest.fingerprint,
        reference_differs=config.reference_differs,
    )
    # Recorded as what it is: on another kind of device `auto` would make it another run.
    dtype = compute_dtype(config.dtype, world.device)
    config = config.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    settings = config.model_dump(mode="json", exclude={"resume"})
    found = find_checkpoint(run.path, progress.say, world) if config.resume else None
    if found is not None:
        require_same_run(found.state, data=data, settings=settings, run=run.path)

    torch.manual_seed(config.seed)
    policy, cost, parity = start(config, folder, model_folder, found, world=world, say=progress.say)
    run.create(yaml.safe_dump(settings, sort_keys=False))
    if parity is not None:
        run.write_parity(parity._asdict())
    optimizer = make_optimizer(policy.model, config)
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    saver = Saver(
        policy, optimizer, config, folder=folder, model_folder=model_folder, parity=parity, world=world
    )
    at, window, best = Counters(), MetricsWindow(policy.device), None
    device = run_device(world)
    budget = config.micro_batch_tokens
    if budget is None and found is not None:
        budget = _kept_budget(found.state, config, device, world, progress.say)
    if budget is None:
        # Before the optimizer's state is loaded, which is counted as still to come.
        budget = _measured_budget(policy, folder, parameters, config, world)
    if found is not None:
        state = found.state
        at, window.state = state.at, state.window
        saver.load_optimizer(found.path)
        run.rewind(Written(state.lines, state.segments))
        progress.say(f"going on from {quoted(found.path.name)}, {at.consumed} pairs into the run")
        if at.step > total_steps:
            progress.say(f"it is beyond the {total_steps} steps that are asked for: the run ends there")
        if state.best is not None and is_comparable(state.best, config.metric_for_best_model, evals):
            best = state.best
            run.write_best(best.model_dump())
        elif state.best is not None:
            progress.say(
                f"step {state.best.step} was the best by {quoted(state.best.metric)} of what was evaluated "
                "then, which --metric-for-best-model no longer asks for: the best is looked for anew"
            )
    elif config.resume:
        run.rewind(Written(0, {}))
        progress.say(f"no checkpoint in {quoted(run.path)}: starting at step 0")
    batching = Batching(budget, cost, world)
    saved_step, saved_time = at.step, time.monotonic()

    def save() -> None:
        nonlocal saved_step, saved_time
        written = run.written()
        state = TrainState(
            at=at,
            window=window.state,
            lines=written.lines,
            segments=written.segments,
            best=best,
            parity=parity._asdict() if parity else None,
            micro_batch_tokens=budget,
            threads=torch.get_num_threads(),
            processes=world.size,
            device=device.type,
            device_bytes=device.memory,
            data=data,
            settings=settings,
        )
        save_checkpoint(run.path, state, partial(saver.write_checkpoint, steps=at.step), world)
        if world.first:
            prune_checkpoints(run.path, step=at.step, keep=config.save_total_limit, best=best)
        saved_step, saved_time = at.step, time.monotonic()

    def log_training(speed: Metrics) -> float:
        nonlocal window
        means = window.means()
        run.log(
            {
                "step": at.step,
                "epoch": round(at.consumed / stream.train_size, 6),
                **means,
                "learning_rate": learning_rate(at.step - 1, total_steps=total_steps, config=config),
                "num_tokens": at.num_tokens,
                "num_unique_tokens": at.num_unique_tokens,
                **speed,
            }
        )
        window = MetricsWindow(policy.device)
        return means["loss"]

    progress.start("training", total=max(total_steps, at.step), unit="steps")
    if at.step:
        progress.advance(at.step)
    steps = stream.steps(seed=config.seed, size=config.batch_size, consumed=at.consumed)
    throughput, note = Throughput(policy, cost, world), ""
    try:
        if at.step >= total_steps and window.pairs:
            log_training({})  # where the run ends earlier than it was to, the checkpoint's last steps
        while True:
            paused = time.perf_counter()
            epoch = at.consumed / stream.train_size
            due = at.step >= total_steps or (config.eval_steps and at.step % config.eval_steps == 0)
            improved = False
            if due and evals and at.step > at.evaluated_step:
                means: Metrics = {}
                for evaluation in evals:
                    means |= evaluate(
                        evaluation, policy, config, run,
                        batching=batching, step=at.step, epoch=epoch, stop=stop,
                    )  # fmt: skip
                run.log({"step": at.step, "epoch": round(epoch, 6), **means})
                at.evaluated_step = at.step
                metric = config.metric_for_best_model
                if metric is not None and is_better(means[metric], metric, best.value if best else None):
                    best = new_best(metric, means[metric], evals, step=at.step)
                    improved = True
            if at.step > saved_step and (improved or _is_time_to_save(config, at.step, saved_time, world)):
                save()
            if improved and best is not None:
                run.write_best(best.model_dump())
            throughput.leave_out(time.perf_counter() - paused)
            if at.step >= total_steps:
                break

            stop.check(world)
            pairs = next(steps)
            set_learning_rate(optimizer, learning_rate(at.step, total_steps=total_steps, config=config))
            results = forward_pairs(
                policy, pairs, config,
                batching=batching, weights=stream.weights(pairs), backward=True, stop=stop,
            )  # fmt: skip
            grad_norm = clip_gradients(parameters, config.max_grad_norm)
            _require_finite(results, grad_norm, pairs, run, step=at.step, dtype=policy.dtype)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            batch = hold_logps(
                pairs, chosen_logps=results.chosen_logps, rejected_logps=results.rejected_logps,
                step=at.step, epoch=epoch, phase="train",
            )  # fmt: skip
            run.add_pair_logps(batch)
            window.add(results, grad_norm)
            throughput.add(pairs)
            at.step += 1
            at.consumed += len(pairs)
            unique = sum(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
            at.num_unique_tokens += unique
            at.num_tokens += unique + sum(len(p.prompt_ids) for p in pairs)
            if at.step % config.logging_steps == 0 or at.step == total_steps:
                note = f"loss {log_training(throughput.metrics()):.4f}"
            progress.advance(1, note)
    except StopRequested as request:
        optimizer.zero_grad(set_to_none=True)
        if at.step > saved_step:
            save()
        resume = resume_command(run.path)
        run.write_preempted({"signal": str(request), "step": at.step, "resume": resume})
        raise Preempted(
            f"stopped by {request} after step {at.step} of {total_steps}",
            where=str(run.path),
            why="the run is saved; the step in work was dropped and is made again",
            fix=resume,
        ) from request
    finally:
        steps.close()
    progress.finish()

    last_metrics = run.last_metrics()
    run.finish(
        step=at.step,
        epoch=at.consumed / stream.train_size,
        total_steps=total_steps,
        num_train_epochs=config.num_train_epochs,
    )
    saver.write_final(final, steps=at.step)
    return TrainResult(final, at.step, parity, last_metrics)


def _measured_budget(
    policy: Policy, folder: ShardFolder, parameters: Sequence[Tensor], config: TrainConfig, world: World
) -> int:
    longest = pair_group(longest_pair(folder))
    coming = optimizer_bytes(parameters, config)
    return choose_budget(policy, longest, optimizer_bytes=coming, world=world)


def _kept_budget(
    state: TrainState, config: TrainConfig, device: Device, world: World, say: Callable[[str], None]
) -> int | None:
    """The budget of the run so far; None where it was measured for something else.

    It is kept where it can be, because another one rounds differently.
    """
    # Older checkpoints do not say on what they were made.
    before = Device(state.device, state.device_bytes) if state.device else device
    recomputed = state.settings["activation_checkpointing"], config.activation_checkpointing
    if state.processes == world.size and before.holds_as_much(device) and recomputed[0] == recomputed[1]:
        return state.micro_batch_tokens
    then, now = (
        f"{processes} x {where}, --activation-checkpointing {recomputation}"
        for processes, where, recomputation in (
            (state.processes, before, recomputed[0]),
            (world.size, device, recomputed[1]),
        )
    )
    say(f"the size of micro-batches is chosen again: {then} then; {now} now")
    return None


def _is_time_to_save(config: TrainConfig, step: int, saved: float, world: World) -> bool:
    if config.save_steps is not None and step % config.save_steps == 0:
        return True
    if config.save_minutes is None:
        return False
    # Clocks differ; all processes must save or none.
    return any_rank(time.monotonic() - saved >= 60 * config.save_minutes, world)


def _require_finite(
    results: PairResults,
    grad_norm: Tensor,
    pairs: Sequence[ScoredPair],
    run: RunFolder,
    *,
    step: int,
    dtype: torch.dtype,
) -> None:
    if bool(torch.isfinite(results.losses).all() & torch.isfinite(grad_norm)):
        return
    losses = results.losses.tolist()
    bad = [pair.row for pair, loss in zip(pairs, losses, strict=True) if not math.isfinite(loss)]
    numbers = {
        "loss": losses,
        "chosen_logps": results.chosen_logps.tolist(),
        "rejected_logps": results.rejected_logps.tolist(),
    }
    dump = run.dump_pairs(pairs, numbers, step=step)
    rows = ", ".join(map(str, bad or [pair.row for pair in pairs][:10]))
    raise DpoOptError(
        f"{'a loss' if bad else 'the gradient'} is not finite (source rows {rows})",
        where=f"step {step + 1}",
        why="the update would have destroyed the policy and was not made; the step's pairs are in "
        f"{quoted(dump)}",
        fix="lower --learning-rate" + ("" if dtype == torch.float32 else ", or use --dtype float32"),
    )
