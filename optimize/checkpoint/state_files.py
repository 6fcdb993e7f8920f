"""Saves and loads the optimizer's tensors exactly, from any number of processes to any other number.

One process writes plain safetensors files. Several processes each write their own parts of the tensors with
torch.distributed.checkpoint in its safetensors form. No process holds all tensors, and nothing is pickled.
"""

import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from dpo_opt.optimize.processes.distributed import World, any_rank, sum_over_ranks
from dpo_opt.schemas.errors import DataError, DpoOptError, first_line, quoted

# Each file is assembled in memory before it is written.
_FILE_BYTES = 2**30
# A network file system may show another machine's files late.
_SEEN_WITHIN_SECONDS = 60


def save_state(folder: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    """Write tensors into a folder that all processes see. Returns when all processes have written.

    Args:
        folder: A new folder, the same for every process.
        tensors: The same names on every process. DTensors are written in parts, other tensors once.
        world: The run's processes.

    Raises:
        OSError: A process cannot write, for example because the disk is full.
        DpoOptError: The first process does not see the files of the others.
    """
    files = _files(tensors)
    if world.size == 1:
        folder.mkdir(parents=True)
        count = max(files.values(), default=0)
        for number in range(1, count + 1):
            save_file(
                {name: tensors[name].detach().contiguous() for name in tensors if files[name] == number},
                folder / f"state-{number:05d}-of-{count:05d}.safetensors",
            )
        return
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        raise _first_failure(error) from None
    _require_shared(folder, world)


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


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Number, from 1, of the file that each tensor goes to: the same on every process."""
    files: dict[str, int] = {}
    number, held = 1, 0
    for name, tensor in tensors.items():
        if held and held + tensor.nbytes > _FILE_BYTES:
            number, held = number + 1, 0
        files[name] = number
        held += tensor.nbytes
    return files


def _require_shared(folder: Path, world: World) -> None:
    own = len(list(folder.glob(f"shard-{world.rank + 1:05d}-*.safetensors")))
    written = int(sum_over_ranks(torch.tensor(own, device=world.device), world))
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
