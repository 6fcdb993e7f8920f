"""The training loop, from top to bottom: pairs, log-probs, loss, gradients, update, metrics, checkpoint.

Only the policy is in memory. The reference comes from the shards, as two numbers per pair.
"""

import contextlib
import functools
import itertools
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_opt.optimize.begin import Run, RunState, new_window, resume_or_begin
from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.evaluation import Evaluation, MemoryRanOut, evaluate, is_better, new_best
from dpo_opt.optimize.first_step import first_step
from dpo_opt.optimize.gradients import repeated_where_memory_ran_out, try_step
from dpo_opt.optimize.less_memory import halve_micro_batches, ran_out_again
from dpo_opt.optimize.losses.preference_loss import NEED_RUNNING
from dpo_opt.optimize.metrics_lines import Metrics
from dpo_opt.optimize.pair_results import PairResults
from dpo_opt.optimize.parity import Parity
from dpo_opt.optimize.prepare import prepare
from dpo_opt.optimize.processes.distributed import (
    World,
    clip_gradients,
    patient_world,
    process_group,
    wait_for_all,
    world_from_environment,
)
from dpo_opt.optimize.run_folder import RunFolder, hold_logps, resume_command
from dpo_opt.optimize.stop_signals import StopRequested, StopSignals, stop_signals
from dpo_opt.optimize.update.optimizer import learning_rate, set_learning_rate
from dpo_opt.optimize.update.set_apart import set_apart
from dpo_opt.schemas.errors import DpoOptError, Preempted, quoted
from dpo_opt.schemas.pairs import ScoredPair
from dpo_opt.schemas.progress import Progress, Silent
from dpo_opt.schemas.run_layout import FINAL


class TrainResult(NamedTuple):
    """Where a run ended."""

    final: Path
    steps: int
    parity: Parity | None
    """None with ``reference_differs``, or if the run was already complete."""
    last_metrics: Metrics


def train(config: TrainConfig, *, progress: Progress | None = None) -> TrainResult:
    """Train a policy on cached reference log-probs.

    Writes ``config.output_dir``: metrics, per-pair log-probs, checkpoints, and ``final/`` in the Hugging Face
    layout. SIGTERM and SIGUSR1 save a checkpoint and end the run.

    Raises:
        Preempted: A signal came. With ``resume`` the run continues as if it had not been stopped.
        DpoOptError: See ``prepare``; also when the cached log-probs are not the policy's own, a loss or
            gradient is not finite, or no checkpoint to resume from is whole.
    """
    world = world_from_environment(os.environ)
    files = RunFolder(config.output_dir, writes=world.first)
    with stop_signals() as stop, process_group(world), contextlib.closing(files):
        return _train(config, files, (progress or Silent()) if world.first else Silent(), stop, world)


def _train(
    config: TrainConfig, files: RunFolder, progress: Progress, stop: StopSignals, world: World
) -> TrainResult:
    prepared = prepare(config)
    total_steps = prepared.total_steps
    final = files.path / FINAL
    ended = files.finished_step()
    patient = patient_world(world)
    # No process writes before all others have read what was there.
    wait_for_all(patient)
    if ended is not None and ended >= total_steps:
        progress.say(f"the run in {quoted(files.path)} is already complete")
        return TrainResult(final, ended, None, files.last_metrics())

    run, state = resume_or_begin(
        config, prepared, files, progress=progress, stop=stop, world=world, patient=patient
    )
    with run.reports, run.saves:
        if state.at.step >= total_steps and state.window.pairs:
            # --max-steps is now below the checkpoint's step: log the steps that it holds unlogged.
            _log_training(run, state, {})
        _take_steps(run, state)
    progress.finish()

    last_metrics = files.last_metrics()
    files.finish(
        step=state.at.step,
        epoch=run.epochs(state.at),
        total_steps=total_steps,
        num_train_epochs=config.num_train_epochs,
        dtype=run.config.dtype,
    )
    run.saver.write_final(final, steps=state.at.step, parity=state.parity)
    return TrainResult(final, state.at.step, state.parity, last_metrics)


def _take_steps(run: Run, state: RunState) -> None:
    """Train to the last step, which is evaluated and saved."""
    config, stream, total_steps = run.config, run.prepared.stream, run.total_steps
    batches = stream.steps(seed=config.seed, size=config.batch_size, consumed=state.at.consumed)
    note = ""
    try:
        first = first_step(run, state, batches)
        run.progress.start(
            "training", total=max(total_steps, state.at.step), unit="steps", done=state.at.step
        )
        set_apart(run.optimizer)
        ahead: list[tuple[list[ScoredPair], PairResults | None]] = []
        if first is not None:
            forward = functools.partial(try_step, run, state, first.pairs)
            ahead = [(first.pairs, first.results(state, forward))]
        steps = itertools.chain(ahead, ((pairs, None) for pairs in batches))
        while True:
            evaluate_and_save(run, state)
            if state.at.step >= total_steps:
                break
            state.save_is_due = run.stop.check(run.world, due=_clock_says_save(run, state))
            train_step(run, state, *next(steps))
            if state.at.step % config.logging_steps == 0 or state.at.step == total_steps:
                note = f"loss {_log_training(run, state, state.throughput.metrics()):.4f}"
            run.progress.advance(1, note)
    except StopRequested as request:
        raise stopped(run, state, request) from request
    finally:
        batches.close()


def train_step(
    run: Run, state: RunState, pairs: Sequence[ScoredPair], results: PairResults | None = None
) -> None:
    """One update of the policy from a batch of pairs; ``results`` if its gradients are computed already.

    Raises:
        StopRequested: A signal came; the policy is as it was before the step.
        DpoOptError: A loss or the gradient is not finite, or memory ran out twice; the policy is as it was
            before the step.
    """
    at, config = state.at, run.config
    rate = learning_rate(at.step, total_steps=run.total_steps, config=config)
    set_learning_rate(run.optimizer, rate)
    again = functools.partial(try_step, run, state, pairs)
    results = results or again()
    grad_norm = clip_gradients(run.parameters, config.max_grad_norm)
    # The one look at the device in a step; only where something is wrong, processes exchange what it is.
    if results is None or not _is_finite(results, grad_norm):
        results = repeated_where_memory_ran_out(run, state, results, again)
        grad_norm = clip_gradients(run.parameters, config.max_grad_norm)
        _require_finite(results, grad_norm, pairs, run.files, step=at.step, dtype=run.policy.dtype)
    run.saves.wait_for_copy()
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)

    batch = hold_logps(
        pairs,
        chosen_logps=results.chosen_logps,
        rejected_logps=results.rejected_logps,
        step=at.step,
        epoch=run.epochs(at),
        phase="train",
    )
    run.files.add_pair_logps(batch)
    state.window.add(pairs, results, grad_norm)
    if not NEED_RUNNING.isdisjoint(config.loss_type):
        state.running = state.running.after(results.chosen_rewards, results.rejected_rewards)
    state.throughput.add(pairs)
    at.step += 1
    at.consumed += len(pairs)
    unique = sum(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    at.num_unique_tokens += unique
    at.num_tokens += unique + sum(len(p.prompt_ids) for p in pairs)


def evaluate_and_save(run: Run, state: RunState) -> None:
    """Between two steps: evaluate and save a checkpoint, each if it is due.

    Raises:
        StopRequested: A signal came; the unfinished evaluation leaves nothing behind.
    """
    paused = time.perf_counter()
    at, config, evals = state.at, run.config, run.prepared.evaluations
    due = at.step >= run.total_steps or (config.eval_steps and at.step % config.eval_steps == 0)
    improved = bool(due and evals and at.step > at.evaluated_step) and _evaluate(run, state)
    if at.step > state.saved_step and (improved or _is_time_to_save(run, state)):
        state.save(run, improved=improved, going_on=at.step < run.total_steps)
    elif improved and state.best is not None:
        run.files.write_best(state.best.model_dump())
    state.throughput.leave_out(time.perf_counter() - paused)


def stopped(run: Run, state: RunState, request: StopRequested) -> Preempted:
    """Save a run that a signal ended, and say how to continue it.

    Raises:
        DpoOptError: It was not a signal: a save in the background failed.
    """
    run.optimizer.zero_grad(set_to_none=True)
    run.saves.wait()
    step = state.at.step
    if step > state.saved_step:
        state.save(run, going_on=False)
    resume = resume_command(run.files.path)
    run.files.write_preempted({"signal": str(request), "step": step, "resume": resume})
    return Preempted(
        f"stopped by {request} after step {step} of {run.total_steps}",
        where=str(run.files.path),
        why="the run is saved; the unfinished step was discarded and will be repeated",
        fix=resume,
    )


def _evaluate(run: Run, state: RunState) -> bool:
    """Evaluate on all held-out pairs and log the means. Returns whether this beats the best so far."""
    at, evals = state.at, run.prepared.evaluations
    epoch = run.epochs(at)
    means: Metrics = {}
    for evaluation in evals:
        means |= _means_of(evaluation, run, state)
    _log(run, {"step": at.step, "epoch": round(epoch, 6), **means})
    at.evaluated_step = at.step
    metric = run.config.metric_for_best_model
    if metric is None or not is_better(means[metric], metric, state.best.value if state.best else None):
        return False
    state.best = new_best(metric, means[metric], evals, step=at.step)
    return True


def _means_of(evaluation: Evaluation, run: Run, state: RunState) -> Metrics:
    """Means over one evaluation's pairs; of a second try in smaller micro-batches, if memory runs out.

    Raises:
        DpoOptError: Memory ran out again; on every process.
    """
    at, name = state.at, "" if evaluation.name is None else f" of {quoted(evaluation.name)}"
    what = f"the evaluation{name} after step {at.step}"

    def attempt() -> Metrics:
        return evaluate(
            evaluation,
            run.policy,
            run.config,
            run.files,
            batching=state.batching,
            running=state.running,
            step=at.step,
            epoch=run.epochs(at),
            stop=run.stop,
        )

    try:
        return attempt()
    except MemoryRanOut as lost:
        process = lost.process
    # Not in the handler: there the error still holds the tensors of the evaluation.
    halve_micro_batches(run, state, process=process, what=what)
    try:
        return attempt()
    except MemoryRanOut as lost:
        raise ran_out_again(
            run,
            state,
            process=lost.process,
            what=what,
            why="the best checkpoint would be chosen, and the run be judged, without this evaluation",
            fix=f"{resume_command(run.files.path)} --micro-batch-tokens {max(1, state.batching.budget // 2)}",
        ) from lost


def _log_training(run: Run, state: RunState, speed: Metrics) -> float:
    """Log the means since the last line of training metrics. Returns the mean loss."""
    at, means = state.at, state.window.means()
    rate = learning_rate(at.step - 1, total_steps=run.total_steps, config=run.config)
    metrics = {
        "step": at.step,
        "epoch": round(run.epochs(at), 6),
        **means,
        "learning_rate": rate,
        "num_tokens": at.num_tokens,
        "num_unique_tokens": at.num_unique_tokens,
        **speed,
    }
    _log(run, metrics)
    state.window = new_window(run)
    return means["loss"]


def _log(run: Run, metrics: Metrics) -> None:
    run.files.log(metrics)
    run.reports.log(metrics)


def _is_time_to_save(run: Run, state: RunState) -> bool:
    every_steps, every_minutes = run.config.save_steps, run.config.save_minutes
    if state.save_is_due or (every_steps is not None and state.at.step % every_steps == 0):
        return True
    saves = every_steps is not None or every_minutes is not None
    return saves and state.at.step >= run.total_steps


def _clock_says_save(run: Run, state: RunState) -> bool:
    every_minutes = run.config.save_minutes
    return every_minutes is not None and time.monotonic() - state.saved_time >= 60 * every_minutes


def _is_finite(results: PairResults, grad_norm: Tensor) -> bool:
    return bool(torch.isfinite(results.losses).all() & torch.isfinite(grad_norm))


def _require_finite(
    results: PairResults,
    grad_norm: Tensor,
    pairs: Sequence[ScoredPair],
    run: RunFolder,
    *,
    step: int,
    dtype: torch.dtype,
) -> None:
    if _is_finite(results, grad_norm):
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
        why="the update would have destroyed the policy, so it was not made; the step's pairs are in "
        f"{quoted(dump)}",
        fix="lower --learning-rate" + ("" if dtype == torch.float32 else ", or use --dtype float32"),
    )
