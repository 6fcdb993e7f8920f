"""Named tensors on disk, bit for bit, whatever number of processes wrote them and whatever number reads them.

Alone, plain safetensors files. Of several processes each writes its own parts of the tensors, through
torch.distributed.checkpoint in its safetensors form: no process holds all, and nothing on disk is pickled.
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

# A file is put together in memory before it is written.
_FILE_BYTES = 2**30
# A network file system may show another machine's files late.
_SEEN_WITHIN_SECONDS = 60


def save_state(folder: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    """Write tensors into a folder that all processes see; returns when all of them have written.

    Args:
        folder: New, the same for every process.
        tensors: The same names on every process. DTensors are written in parts, others once.
        world: The processes.

    Raises:
        OSError: A process cannot write, such as on a full disk.
        DpoOptError: The first process does not see what the others wrote.
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
        folder: Where it wrote.
        tensors: The same names, shapes and dtypes as were written; DTensors take their own parts.
        world: The processes.

    Raises:
        DataError: The folder holds other tensors, or cannot be read.
    """
    try:
        reader = HuggingFaceStorageReader(str(folder))
        _require_same(reader, tensors)
        with warnings.catch_warnings():
            # That it is one process alone is what it was told.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(dict(tensors), storage_reader=reader, no_dist=world.size == 1)
    except (CheckpointException, SafetensorError, OSError) as error:
        cause = _first_failure(error) if isinstance(error, CheckpointException) else error
        raise DataError(
            f"the saved state cannot be read ({first_line(cause)})",
            where=str(folder),
            why="training would not go on from where it stopped",
            fix="restore the folder, or remove its checkpoint to go on from the one before",
        ) from error


def _first_failure(error: CheckpointException) -> BaseException:
    """What went wrong on the first process where something did."""
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
            f"the processes wrote {written} files, and process {world.rank} sees {seen}",
            where=str(folder),
            why="a checkpoint that lacks another machine's parts cannot be resumed from",
            fix="pass an --output-dir that all machines share",
        )


def _require_same(reader: HuggingFaceStorageReader, tensors: Mapping[str, Tensor]) -> None:
    """torch.distributed.checkpoint itself would cast in silence, and ignore tensors that nobody asks for."""
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
            f"the saved state is another one: {len(differing)} tensors differ, such as {quoted(name)} "
            f"({saved.get(name, 'missing')} saved, {wanted.get(name, 'none')} wanted)",
            where=str(reader.path),
            why="training would not go on from where it stopped",
            fix="resume with the model and the settings that the run was started with",
        )
