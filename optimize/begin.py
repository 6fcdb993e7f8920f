"""Begins or resumes a training run: ``Run`` holds what stays the same, ``RunState`` what steps change."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor
from torch.optim import Optimizer

from dpo_opt.optimize.build_policy import start
from dpo_opt.optimize.checkpoint.background import BackgroundSaves
from dpo_opt.optimize.checkpoint.checkpoints import (
    Best,
    Checkpoint,
    Counters,
    Data,
    TrainState,
    find_checkpoint,
    prune_checkpoints,
    require_same_run,
    save_checkpoint,
)
from dpo_opt.optimize.checkpoint.saving import Saver, Snapshot
from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.evaluation import is_comparable
from dpo_opt.optimize.forward.packing import pair_group
from dpo_opt.optimize.forward.policy import Policy, compute_dtype
from dpo_opt.optimize.losses.preference_loss import is_unpaired
from dpo_opt.optimize.losses.running import Running
from dpo_opt.optimize.memory.budget import Device, choose_budget, longest_pair, run_device
from dpo_opt.optimize.metrics_window import MetricsWindow
from dpo_opt.optimize.parity import Parity
from dpo_opt.optimize.prepare import Prepared
from dpo_opt.optimize.processes.distributed import World, from_all
from dpo_opt.optimize.reporting.reports import Reports
from dpo_opt.optimize.run_folder import RunFolder, Written
from dpo_opt.optimize.step import Batching
from dpo_opt.optimize.stop_signals import StopSignals
from dpo_opt.optimize.throughput import Throughput
from dpo_opt.optimize.update.optimizer import make_optimizer, optimizer_bytes
from dpo_opt.schemas.counts import counted
from dpo_opt.schemas.errors import quoted
from dpo_opt.schemas.progress import Progress


class Run(NamedTuple):
    """What stays the same from a run's first step to its last."""

    config: TrainConfig
    """With the dtype that ``auto`` resolved to."""
    settings: dict[str, Any]
    """The configuration as the run folder records it."""
    prepared: Prepared
    data: Data
    files: RunFolder
    policy: Policy
    parameters: list[Tensor]
    optimizer: Optimizer
    saver: Saver
    saves: BackgroundSaves
    reports: Reports
    device: Device
    stop: StopSignals
    world: World
    patient: World
    """The processes of ``world``, for exchanges that wait for a disk."""
    progress: Progress

    @property
    def total_steps(self) -> int:
        return self.prepared.total_steps

    def epochs(self, at: Counters) -> float:
        """Passes over the training pairs that are made."""
        return at.consumed / self.prepared.stream.train_size


@dataclass
class RunState:
    """How far a run has come; every checkpoint holds it."""

    window: MetricsWindow
    throughput: Throughput
    batching: Batching
    at: Counters = field(default_factory=Counters)
    parity: Parity | None = None
    """None until the first step's forward, and with ``reference_differs``."""
    running: Running = field(default_factory=Running)
    best: Best | None = None
    saved_step: int = 0
    saved_time: float = field(default_factory=time.monotonic)
    """``time.monotonic()`` of the last checkpoint, in seconds."""
    save_is_due: bool = False
    """Whether ``save_minutes`` have passed since."""

    def save(self, run: Run, *, improved: bool = False, going_on: bool = True) -> None:
        """Begin to write a checkpoint; then the older ones beyond ``save_total_limit`` are removed.

        Args:
            run: The run.
            improved: Whether this is the best checkpoint so far.
            going_on: Whether steps will follow. If not, nothing is copied, and the checkpoint is written when
                this returns.

        Raises:
            DpoOptError: The disk is full, or was when the checkpoint before was written.
        """
        # Main memory is counted for one copy.
        run.saves.wait()
        written = run.files.written()
        state = TrainState(
            at=self.at.model_copy(),
            epoch=run.epochs(self.at),
            window=self.window.state,
            running=self.running,
            lines=written.lines,
            segments=written.segments,
            best=self.best,
            parity=self.parity._asdict() if self.parity else None,
            micro_batch_tokens=self.batching.budget,
            threads=torch.get_num_threads(),
            processes=run.world.size,
            device=run.device.type,
            device_bytes=run.device.memory,
            data=run.data,
            settings=run.settings,
        )

        def write(snapshot: Snapshot) -> None:
            save = partial(
                run.saver.write_checkpoint, snapshot=snapshot, steps=state.at.step, parity=self.parity
            )
            save_checkpoint(run.files.path, state, save, run.patient)
            if run.world.first:
                keep = run.config.save_total_limit
                prune_checkpoints(run.files.path, step=state.at.step, keep=keep, best=state.best)
            if improved and state.best is not None:
                run.files.write_best(state.best.model_dump())

        snapshot = run.saver.snapshot()
        if going_on:
            run.saves.begin(snapshot, write)
        else:
            write(snapshot)
        self.saved_step, self.saved_time, self.save_is_due = self.at.step, time.monotonic(), False


def resume_or_begin(
    config: TrainConfig,
    prepared: Prepared,
    files: RunFolder,
    *,
    progress: Progress,
    stop: StopSignals,
    world: World,
    patient: World,
) -> tuple[Run, RunState]:
    """Load the policy and everything else a run needs; with ``resume`` from the newest checkpoint.

    Of a run that has no checkpoint nothing is written: see ``open_folder``. ``patient`` is from
    ``patient_world``.

    Raises:
        ConfigError: The checkpoint is of another run, another run is at work, or the model cannot be trained.
        DataError: No checkpoint is whole.
    """
    folder, model_folder = prepared.folder, prepared.model_folder
    data = _data(config, prepared)
    # The resolved dtype is recorded: on another kind of device `auto` would mean another one.
    dtype = compute_dtype(config.dtype, world.device)
    config = config.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    settings = config.model_dump(mode="json", exclude={"resume"})
    checkpoint = _claimed(files, progress.say, patient) if config.resume else None
    if checkpoint is not None:
        require_same_run(checkpoint.state, data=data, settings=settings, run=files.path)

    torch.manual_seed(config.seed)
    device = run_device(world)
    policy, cost = start(
        config, prepared, checkpoint, world=world, patient=patient, device=device, say=progress.say
    )
    optimizer = make_optimizer(policy.model, config)
    parameters: list[Tensor] = [p for p in policy.model.parameters() if p.requires_grad]
    budget = config.micro_batch_tokens
    if checkpoint is not None:
        budget = kept_budget(checkpoint.state, config, device, world, progress.say)
    if budget is None:
        # The optimizer's state is not loaded yet, so its bytes are passed along.
        coming = optimizer_bytes(parameters, config)
        longest = pair_group(longest_pair(folder))
        budget = choose_budget(policy, longest, optimizer_bytes=coming, world=world)
    saver = Saver(
        policy,
        optimizer,
        config,
        folder=folder,
        model_folder=model_folder,
        world=world,
        patient=patient,
    )
    run = Run(
        config=config,
        settings=settings,
        prepared=prepared,
        data=data,
        files=files,
        policy=policy,
        parameters=parameters,
        optimizer=optimizer,
        saver=saver,
        saves=BackgroundSaves(lambda: stop.request("a save that failed")),
        reports=Reports(
            config.report_to if world.first else [], run=files.path, settings=settings, say=progress.say
        ),
        device=device,
        stop=stop,
        world=world,
        patient=patient,
        progress=progress,
    )
    batching = Batching(budget, cost, world)
    if checkpoint is not None:
        return run, _resumed(run, checkpoint, batching)
    if config.resume:
        progress.say(f"no checkpoint in {quoted(files.path)}: starting at step 0")
    return run, _new_state(run, batching)


def _claimed(files: RunFolder, say: Callable[[str], None], patient: World) -> Checkpoint | None:
    """The newest checkpoint of a folder in which no other run is at work."""
    if files.path.is_dir():
        from_all(files.claim, patient)
    return find_checkpoint(files.path, say, patient)


def open_folder(run: Run, parity: Parity | None, written: Written, *, step: int = 0) -> None:
    """Begin to write the run's folder: its configuration, and the parity if it was measured.

    Of an older beginning all but ``written``, up to ``step``, is removed.
    """
    run.files.create(yaml.safe_dump(run.settings, sort_keys=False), new=not run.config.resume)
    if parity is not None:
        run.files.write_parity(parity._asdict())
    if run.config.resume and (lost := run.files.rewind(written, step=step)):
        run.progress.say(f"gone since the checkpoint, and not written again: {', '.join(lost)}")


def _data(config: TrainConfig, prepared: Prepared) -> Data:
    manifest = prepared.folder.manifest
    return Data(
        dataset_digest=manifest.dataset_digest,
        index_sha256=manifest.index_sha256,
        fingerprint=manifest.fingerprint,
        reference_differs=config.reference_differs,
        weights_and_margins=prepared.stream.values_sha256,
    )


def new_window(run: Run) -> MetricsWindow:
    """The sums of no pair yet."""
    unpaired = is_unpaired(run.config.loss_type)
    return MetricsWindow(run.policy.device, unpaired=unpaired, beta=run.config.beta)


def _new_state(run: Run, batching: Batching) -> RunState:
    throughput = Throughput(run.policy, batching.cost, batching.world)
    return RunState(new_window(run), throughput, batching)


def _resumed(run: Run, checkpoint: Checkpoint, batching: Batching) -> RunState:
    """The state that a checkpoint holds. Removes what the run wrote after that checkpoint."""
    kept, say = checkpoint.state, run.progress.say
    run.saver.load_optimizer(checkpoint.path)
    state = _new_state(run, batching)
    # A newer version of this program may have recorded more fields.
    known = {name: value for name, value in (kept.parity or {}).items() if name in Parity._fields}
    state.parity = Parity(**known) if known else None
    open_folder(run, state.parity, Written(kept.lines, kept.segments), step=kept.at.step)
    state.at, state.window.state, state.saved_step = kept.at, kept.window, kept.at.step
    state.running = kept.running
    consumed = counted(kept.at.consumed, run.data.fingerprint.noun)
    say(f"continuing from {quoted(checkpoint.path.name)}, {consumed} into the run")
    if kept.at.step > run.total_steps:
        say(f"the checkpoint is already past the {run.total_steps} requested steps, so the run ends there")
    if kept.best is not None and is_comparable(
        kept.best, run.config.metric_for_best_model, run.prepared.evaluations
    ):
        state.best = kept.best
        run.files.write_best(kept.best.model_dump())
    elif kept.best is not None:
        say(
            f"step {kept.best.step} was the best by {quoted(kept.best.metric)}, but --metric-for-best-model "
            "or the evaluation data changed: the search for the best checkpoint starts again"
        )
    return state


def kept_budget(
    state: TrainState, config: TrainConfig, device: Device, world: World, say: Callable[[str], None]
) -> int | None:
    """The run's micro-batch budget so far; None if it was measured under other circumstances.

    It is kept if possible, because another budget rounds differently. One that the user asks for now is used,
    unless it was asked for before: memory may have run out since, and halved it.
    """
    if config.micro_batch_tokens is not None:
        asked = config.micro_batch_tokens
        return state.micro_batch_tokens if asked == state.settings["micro_batch_tokens"] else asked
    # Older checkpoints do not name their device.
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
    say(f"the micro-batch size is chosen again: the run used {then}, and now uses {now}")
    return None
