"""Which device's way of computing is taken. Kernels, blocks and buffers differ between GPU and CPU.

Memory is counted on tensors without data (``memory.count``). Autograd does not run on those of a device that
torch was not built for, so where they stand for a GPU's they lie on the CPU.
"""

import contextlib
from collections.abc import Iterator

import torch

_stands_for_gpu = False


def takes_gpu_path(device: torch.device) -> bool:
    """Whether tensors of this device are computed as on a GPU."""
    return device.type == "cuda" or _stands_for_gpu


def stands_for_gpu() -> bool:
    """Whether the CPU's tensors now stand for a GPU's."""
    return _stands_for_gpu


@contextlib.contextmanager
def standing_for_gpu(stands: bool = True) -> Iterator[None]:
    """The CPU's tensors are computed as a GPU's of the Ampere generation or later, while the block runs.

    Only without data: the CPU lacks the kernels.
    """
    global _stands_for_gpu
    before, _stands_for_gpu = _stands_for_gpu, stands
    try:
        yield
    finally:
        _stands_for_gpu = before
