"""Checkpoints of a training run: save, find the newest valid one, check every byte, remove old ones.

    checkpoints/step-00000100/
        model.safetensors ...    the Hugging Face layout; loads in transformers and vLLM
        optimizer/               the optimizer's state, by parameter, in safetensors files
        training_state.json      how far the run had come, its settings and its data
        COMPLETE.json            hash of every other file, written last

A checkpoint appears under its name only after all of its bytes are on the disk. Removing one deletes its
``COMPLETE.json`` first, so that a half-removed checkpoint is never mistaken for a damaged one.
"""

import contextlib
import errno
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.losses.running import Running
from dpo_opt.optimize.processes.distributed import World, from_all, text_from_first
from dpo_opt.optimize.run_folder import resume_command
from dpo_opt.schemas.errors import ConfigError, DataError, quoted
from dpo_opt.schemas.fingerprint import Fingerprint, short_value
from dpo_opt.schemas.full_disk import room_on_disk
from dpo_opt.schemas.locations import AnyPath, inside
from dpo_opt.schemas.manifest import Sha256, parse, to_json
from dpo_opt.schemas.run_layout import CHECKPOINTS, COMPLETE, TRAIN_STATE, checkpoint_path, checkpoint_steps
from dpo_opt.schemas.storage import publish_folder, sha256_file

# Settings that change neither the updates nor the data, so a resumed run may change them.
_FREE = {
    "model", "shards", "output_dir", "resume", "micro_batch_tokens", "activation_checkpointing",
    "logging_steps", "eval_steps", "eval_shards", "save_steps", "save_minutes", "save_total_limit",
    "metric_for_best_model", "save_dtype", "report_to",
}  # fmt: skip
_LENGTHS = {"num_train_epochs", "max_steps"}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Best(_Record):
    """The checkpoint with the best evaluation so far."""

    metric: str
    value: float
    step: int
    pairs: str | None = None
    """Hash of the index of the shards it was evaluated on; None: the prompts held out of the run's own."""


class Data(_Record):
    """The data and the reference of a run, by content. The index fixes the pairs and their order."""

    dataset_digest: str
    index_sha256: str
    fingerprint: Fingerprint
    reference_differs: bool
    """Whether the reference is another model than the one the run started from."""
    weights_and_margins: str = ""
    """Hash of the pairs' weights, and of their margins where the loss reads them; empty in checkpoints of
    versions that did not record it."""


class Counters(BaseModel):
    """How far a run has come."""

    model_config = ConfigDict(extra="forbid")

    step: NonNegativeInt = 0
    """Optimizer updates made."""
    consumed: NonNegativeInt = 0
    """Training pairs seen: with the seed, the state of the data order."""
    num_tokens: NonNegativeInt = 0
    """Tokens of the pairs seen; prompts count twice."""
    num_unique_tokens: NonNegativeInt = 0
    """Tokens of the pairs seen; prompts count once."""
    evaluated_step: NonNegativeInt = 0
    """Update after which the last evaluation was made; 0 before the first."""


class TrainState(_Record):
    """All that a run needs to continue as if it had not stopped, besides weights and optimizer state."""

    format: Literal[1] = 1
    at: Counters
    epoch: float = 0.0
    """Passes over the training pairs; 0 in checkpoints of versions that did not record it."""
    window: list[float]
    """Sums of the metrics since the last line of metrics (step.MetricsWindow)."""
    running: Running = Running()
    """The rewards of training so far, as losses that read them know them."""
    lines: NonNegativeInt
    """Lines of metrics that were written."""
    segments: dict[str, NonNegativeInt]
    """Files of pair log-probs that were written, by folder."""
    best: Best | None
    parity: dict[str, Any] | None
    """Parity of the policy that the run started from; None with ``reference_differs``."""
    micro_batch_tokens: PositiveInt
    """The micro-batch budget in token rows; another budget rounds differently."""
    threads: int
    """Number of CPU threads; another number rounds differently."""
    processes: int
    """Number of processes; another number rounds differently."""
    device: str | None = None
    """Type of the device, such as ``cuda``; None in older checkpoints."""
    device_bytes: int | None = None
    """Memory of the smallest of the processes' GPUs; None on a CPU and in older checkpoints."""
    data: Data
    settings: dict[str, Any]
    """The run's resolved configuration."""


class _File(_Record):
    file: str
    bytes: int
    sha256: Sha256


class _Complete(_Record):
    step: int
    files: list[_File]


def save_checkpoint(
    run: Path, state: TrainState, write: Callable[[Path], Mapping[str, str]], world: World
) -> Path:
    """Write a checkpoint whole or not at all. A valid checkpoint of the same step is left alone.

    Args:
        run: The run's folder.
        state: How far the run has come.
        write: Called by every process with the same folder; writes weights and optimizer state there.
            Returns the SHA-256 of files of all processes, by name; the other files are read to be hashed.
        world: From ``patient_world``.

    Returns:
        The checkpoint.

    Raises:
        DpoOptError: The disk is full; earlier checkpoints are untouched.
    """
    path = checkpoint_path(run, state.at.step)
    with room_on_disk(path.parent), contextlib.ExitStack() as published:

        def begin() -> str:
            if not world.first or (path.is_dir() and _damage(path) is None):
                return ""
            if path.is_dir():
                _remove(path)
            return str(published.enter_context(publish_folder(path)))

        private = from_all(begin, world)[0]
        if private:
            hashes = write(Path(private))
            from_all(lambda: _complete(Path(private), state, hashes) if world.first else None, world)
            from_all(published.close, world)
    return path


def _complete(private: Path, state: TrainState, hashes: Mapping[str, str]) -> None:
    """Write the last files of a checkpoint."""
    (private / TRAIN_STATE).write_text(to_json(state), encoding="utf-8")
    files = {file.relative_to(private).as_posix(): file for file in private.rglob("*") if file.is_file()}
    complete = _Complete(
        step=state.at.step,
        files=[
            _File(file=name, bytes=file.stat().st_size, sha256=hashes.get(name) or sha256_file(file))
            for name, file in sorted(files.items())
        ],
    )
    (private / COMPLETE).write_text(to_json(complete), encoding="utf-8")


def prune_checkpoints(run: Path, *, step: int, keep: int, best: Best | None) -> None:
    """Remove all but the newest ``keep`` checkpoints up to ``step`` and the best one.

    Checkpoints after ``step`` are damaged, or the run would have resumed from them.
    """
    steps = checkpoint_steps(run)
    newest = [path for path, made in reversed(steps.items()) if made <= step][:keep]
    kept = {*newest, *([checkpoint_path(run, best.step)] if best else [])}
    for path in steps:
        if path not in kept:
            _remove(path)


class Checkpoint(NamedTuple):
    """A checkpoint whose bytes were checked."""

    path: Path
    state: TrainState


def read_state(checkpoint: Path, *, fix: str | None = None) -> TrainState:
    """How far a run had come.

    Raises:
        DataError: What the checkpoint says of it is damaged; the error has this fix.
    """
    file = checkpoint / TRAIN_STATE
    return parse(TrainState, file.read_bytes(), where=file, fix=fix)


def find_checkpoint(run: Path, say: Callable[[str], None], world: World) -> Checkpoint | None:
    """``newest_checkpoint`` for several processes: the first one looks, and all get the same.

    ``world`` is from ``patient_world``, because looking means to hash the newest checkpoint.
    """
    found = newest_checkpoint(run, say) if world.first else None
    name = text_from_first(found.path.name if found else "", world)
    if found or not name:
        return found
    path = run / CHECKPOINTS / name
    return Checkpoint(path, read_state(path))


def newest_checkpoint(run: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose bytes are those that were written; None if there never was one.

    Also removes what a crash left of a checkpoint that was being written.

    Args:
        run: The run's folder.
        say: Called with a line for every damaged checkpoint that is skipped.

    Raises:
        DataError: There are checkpoints, and each is damaged.
    """
    for left in (run / CHECKPOINTS).glob(".step-*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    damage = None
    for path in reversed(checkpoint_steps(run)):
        damage = _damage(path)
        if damage is None:
            other = f"restore it, or continue from the checkpoint before: rm -r {quoted(path)}"
            return Checkpoint(path, read_state(path, fix=other))
        say(f"skipping the damaged checkpoint {quoted(path.name)}: {damage}")
    if damage is None:
        return None
    raise DataError(
        f"every checkpoint is damaged; in the oldest one, {damage}",
        where=str(run / CHECKPOINTS),
        why="continuing from changed bytes would train another model than the one that was saved",
        fix=f"restore the files, or start again: rm -r {quoted(run)}",
    )


def require_same_run(state: TrainState, *, data: Data, settings: dict[str, Any], run: Path) -> None:
    """Refuse to resume with other data or settings than the checkpoint was made with.

    Raises:
        ConfigError: A difference would make it another run; the message lists every difference.
    """
    # A setting that was added since had its default then.
    defaults = {name: field.default for name, field in TrainConfig.model_fields.items()}
    saved = {**defaults, **state.settings, **_flat(state.data)}
    current = {**settings, **_flat(data)}
    if saved["dtype"] == "auto":  # in checkpoints from before it was resolved
        saved["dtype"] = current["dtype"]
    free = _FREE | (_LENGTHS if _rate_is_any_lengths(settings) else set())
    if not state.data.weights_and_margins:
        free |= {"weights_and_margins"}
    differing = [name for name in current if name not in free and saved.get(name) != current[name]]
    if not differing:
        return
    rows = [
        f"    {name}: {short_value(saved.get(name))} then, {short_value(current[name])} now"
        for name in differing
    ]
    why = "a run with mixed settings gives neither the old settings' result nor the new ones'"
    if set(differing) <= _LENGTHS:
        why = (
            "the learning rate of every step depends on the length of the run; the length can change only "
            "with --lr-scheduler-type constant, and --warmup-steps 0, 1 or more"
        )
    raise ConfigError(
        "the run was started with other settings or other shards\n" + "\n".join(rows),
        where=str(run),
        why=why,
        fix=f"{resume_command(run)}, or start a new run in another --output-dir",
    )


def _rate_is_any_lengths(settings: dict[str, Any]) -> bool:
    """Whether the learning rate of each step is the same for any number of steps."""
    warmup: float = settings["warmup_steps"]
    if 0 < warmup < 1:
        return False  # a share of all steps
    return bool(settings["lr_scheduler_type"] == "constant")


def _flat(data: Data) -> dict[str, object]:
    body = data.model_dump()
    fingerprint = body.pop("fingerprint")
    return {**body, **{f"shards' {name}": value for name, value in fingerprint.items()}}


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if every byte is as it was written."""
    record = path / COMPLETE
    if not record.is_file():
        return f"{COMPLETE} is missing: it was being removed, or files were deleted"
    try:
        complete = parse(_Complete, record.read_bytes(), where=record)
    except DataError as error:
        return f"{COMPLETE} cannot be read ({error.what})"
    if complete.step != int(path.name.removeprefix("step-")):
        return f"{COMPLETE} is that of step {complete.step}"
    if TRAIN_STATE not in [entry.file for entry in complete.files]:
        return f"{COMPLETE} does not name {TRAIN_STATE}"
    for entry in complete.files:
        try:
            file = inside(path, entry.file)
        except DataError as error:
            return error.what
        if not _is_file(file):
            return f"{quoted(entry.file)} is missing"
        if file.stat().st_size != entry.bytes:
            return f"{quoted(entry.file)} has {file.stat().st_size} bytes, not {entry.bytes}"
        if sha256_file(file) != entry.sha256:
            return f"the bytes of {quoted(entry.file)} changed"
    return None


def _is_file(path: AnyPath) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def _remove(path: Path) -> None:
    (path / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
