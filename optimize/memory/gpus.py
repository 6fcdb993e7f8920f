"""The memory of usual GPUs, for a forecast on a machine that has none of them."""

import re
from typing import NamedTuple

from dpo_opt.optimize.memory.budget import Device
from dpo_opt.schemas.errors import ConfigError

# MiB, as NVIDIA's driver reports them (nvidia-smi, memory.total).
_MEMORY = {
    "A10-24GB": 23028,
    "A100-40GB": 40960,
    "A100-80GB": 81920,
    "A40-48GB": 46068,
    "A6000-48GB": 49140,
    "B200-180GB": 183359,
    "GH200-96GB": 97871,
    "H100-80GB": 81559,
    "H100-94GB": 95830,
    "H200-141GB": 143771,
    "L4-24GB": 23034,
    "L40S-48GB": 46068,
    "RTX3090-24GB": 24576,
    "RTX4090-24GB": 24564,
    "RTX5090-32GB": 32607,
}
# Share of it that tensors can take. CUDA itself takes about 0.5 GB, and the allocator's blocks do not fit
# into one another without gaps.
_USABLE = 0.93


class Gpus(NamedTuple):
    """GPUs of one kind, each driven by one process of a run."""

    number: int
    name: str
    memory: int
    """Bytes of one of them."""

    @property
    def device(self) -> Device:
        """One of them."""
        return Device("cuda", self.memory)

    @property
    def usable(self) -> int:
        """Bytes of one of them that tensors can take."""
        return int(_USABLE * self.memory)


def parse_gpus(text: str) -> Gpus:
    """GPUs from a number and a name, such as ``2xH100-80GB``, or a memory, such as ``1x24GB``.

    Raises:
        ConfigError: No GPU has that name, or several.
    """
    found = re.fullmatch(r"(?:([1-9]\d*)x)?(.+)", text.strip(), re.IGNORECASE)
    count, asked = (int(found[1] or 1), found[2].upper()) if found else (1, "")
    size = re.fullmatch(r"([1-9]\d*)GB", asked)
    if size:
        return Gpus(count, asked, int(size[1]) * 10**9)
    names = [name for name in _MEMORY if asked in (name, name.rpartition("-")[0])]
    if len(names) != 1:
        raise ConfigError(
            f"--gpus {text!r} is the name of {'several GPUs' if names else 'no GPU that is known here'}",
            why="its memory decides whether the run fits",
            fix=f"pass one of {', '.join(names or _MEMORY)}, or a memory: --gpus {count}x80GB",
        )
    return Gpus(count, names[0], _MEMORY[names[0]] * 2**20)
