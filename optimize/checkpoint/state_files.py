"""Saves and loads the optimizer's tensors exactly, from any number of processes to any other number.

One process writes plain safetensors files. Several processes each write their own parts of the tensors, in
the form that torch.distributed.checkpoint reads. No process holds all tensors, and nothing is pickled.
"""

import json
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor

from dpo_opt.optimize.checkpoint.tensor_file import write_tensors
from dpo_opt.optimize.processes.distributed import World, any_rank, from_all
from dpo_opt.schemas.errors import DataError, DpoOptError, first_line, quoted

# Bytes of a file, summed over the processes.
_FILE_BYTES = 2**30
# A network file system may show another machine's files late.
_SEEN_WITHIN_SECONDS = 60


class StateFile(NamedTuple):
    """One file of this process's part of a state."""

    name: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    """Where the parts lie in their whole tensors, as torch.distributed.checkpoint reads it."""


def own_files(tensors: Mapping[str, Tensor], world: World) -> list[StateFile]:
    """This process's files of a state. They hold the tensors themselves, not copies.

    Args:
        tensors: The same names on every process. Every process writes its parts of DTensors; the first one
            writes the other tensors.
        world: The run's processes.
    """
    numbers = _file_numbers(tensors)
    count = max(numbers.values(), default=0)
    files = []
    for number in range(1, count + 1):
        parts: dict[str, Tensor] = {}
        offsets: dict[str, dict[str, list[int]]] = {}
        for name in (name for name in tensors if numbers[name] == number):
            tensor = tensors[name].detach()
            place = [0] * tensor.ndim
            if isinstance(tensor, DTensor):
                (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
                tensor, place = tensor.to_local(), list(chunk.offsets)
                if not tensor.numel():
                    continue  # fewer rows than processes
            elif not world.first:
                continue
            parts[name], offsets[name] = tensor, {"saved_offsets": place}
        if world.size == 1:
            files.append(StateFile(f"state-{number:05d}-of-{count:05d}.safetensors", parts, {}))
        elif parts:
            name = f"shard-{world.rank + 1:05d}-model-{number:05d}-of-{count:05d}.safetensors"
            files.append(StateFile(name, parts, {"DCP_SHARDING_INFO": json.dumps(offsets)}))
    return files


def save_state(
    folder: Path,
    files: list[StateFile],
    world: World,
    *,
    beside: Callable[[], dict[str, str]] = dict,
) -> dict[str, str]:
    """Write a state into a folder that all processes see. Returns when all processes have written.

    Args:
        folder: A new folder, the same for every process.
        files: From ``own_files``: this process's.
        world: From ``patient_world``.
        beside: Writes what else this process has to write; returns hashes by the file's name.

    Returns:
        Hex SHA-256 of every file that a process wrote, by name; a state's files as ``folder/name``.

    Raises:
        OSError: A process cannot write, for example because the disk is full.
        DpoOptError: The first process does not see the files of the others.
    """

    def write() -> tuple[dict[str, str], int]:
        folder.mkdir(parents=True, exist_ok=True)
        hashes = beside()
        for file in files:
            hash_ = write_tensors(folder / file.name, file.tensors, file.metadata)
            hashes[f"{folder.name}/{file.name}"] = hash_
        return hashes, len(files)

    written = from_all(write, world)
    if world.size > 1:
        _require_shared(folder, sum(count for _, count in written), world)
    return {name: hash_ for hashes, _ in written for name, hash_ in hashes.items()}


def load_state(folder: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    """Fill tensors, in place, with what ``save_state`` wrote from any number of processes.

    Args:
        folder: The folder that ``save_state`` wrote.
        tensors: The same names, shapes and dtypes as were written; DTensors take their own parts.
        world: The run's processes.

    Raises:
        DataError: The folder holds other tensors, or cannot be read.
    """
    try:
        reader = HuggingFaceStorageReader(str(folder))
        _require_same(reader, tensors)
        with warnings.catch_warnings():
            # torch warns that there is no process group; with one process that is intended.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(dict(tensors), storage_reader=reader, no_dist=world.size == 1)
    except (CheckpointException, SafetensorError, OSError) as error:
        cause = _first_failure(error) if isinstance(error, CheckpointException) else error
        raise DataError(
            f"the saved state cannot be read ({first_line(cause)})",
            where=str(folder),
            why="training could not continue from where it stopped",
            fix="restore the folder, or remove its checkpoint to continue from the one before",
        ) from error


def _first_failure(error: CheckpointException) -> BaseException:
    """The error of the lowest-numbered process that failed."""
    return min(error.failures.items())[1][0]


def _file_numbers(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Number, from 1, of the file that each tensor goes to: the same on every process."""
    files: dict[str, int] = {}
    number, held = 1, 0
    for name, tensor in tensors.items():
        if held and held + tensor.nbytes > _FILE_BYTES:
            number, held = number + 1, 0
        files[name] = number
        held += tensor.nbytes
    return files


def _require_shared(folder: Path, written: int, world: World) -> None:
    give_up = time.monotonic() + _SEEN_WITHIN_SECONDS
    while (seen := len(list(folder.glob("shard-*.safetensors")))) < written:
        if not world.first or time.monotonic() > give_up:
            break
        time.sleep(1)
    if any_rank(world.first and seen < written, world):
        raise DpoOptError(
            f"the processes wrote {written} files, but process {world.rank} sees {seen}",
            where=str(folder),
            why="a checkpoint that lacks another machine's parts cannot be resumed from",
            fix="pass an --output-dir that all machines share",
        )


def _require_same(reader: HuggingFaceStorageReader, tensors: Mapping[str, Tensor]) -> None:
    """Refuse other tensors: torch.distributed.checkpoint would silently cast them, or ignore extra ones."""
    saved = {
        name: f"{found.properties.dtype} {list(found.size)}"
        for name, found in reader.read_metadata().state_dict_metadata.items()
        if isinstance(found, TensorStorageMetadata)
    }
    wanted = {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()}
    differing = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
    if differing:
        name = differing[0]
        raise DataError(
            f"the saved optimizer state does not fit: {len(differing)} tensors differ, such as "
            f"{quoted(name)} ({saved.get(name, 'missing')} saved, {wanted.get(name, 'none')} wanted)",
            where=str(reader.path),
            why="training could not continue from where it stopped",
            fix="resume with the model and the settings that the run was started with",
        )
