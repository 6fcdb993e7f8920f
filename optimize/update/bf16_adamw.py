"""AdamW for bfloat16 parameters: fp32 arithmetic, and stochastic rounding so that small updates are not lost.

bf16 keeps 8 significant bits, and an AdamW step is about as large as the learning rate. At a rate of 1e-6,
rounding to the nearest leaves every weight above 5e-4 unchanged, and at a beta2 of 0.999 a second moment
never falls. Stochastic rounding rounds up with the probability of the part that is cut off, so a number is
right on average (Zamirai et al. 2020, https://arxiv.org/abs/2010.06192; Ozkara et al. 2025,
https://arxiv.org/abs/2502.20566).

Bytes per parameter: 8 (parameter, gradient and both moments, 2 each), or 10 with fp32 gradients. All in fp32
takes 16.

The random bits are a hash of (seed, step, parameter, element). So there is no generator whose state must be
saved, and a resumed run computes the same numbers as one that was not interrupted.

On a GPU one kernel per parameter (``rounding_kernel``) reads and writes each number once: 14 bytes per
parameter, 16 with fp32 gradients. A CPU does the same in blocks that stay in its cache.
"""

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dpo_opt.optimize.forward.device_path import takes_gpu_path

# Elements per block: so many stay in a CPU's cache. They change no result.
_BLOCK = 1 << 18


class RoundedAdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019) with stochastic rounding of parameters and moments in bfloat16.

    Parameters of another dtype are updated in that dtype, without rounding. Gradients of a bfloat16 parameter
    may be bfloat16 or float32. Each process updates its own part of a sharded parameter.

    Args:
        params: Parameters or groups; contiguous.
        lr: Learning rate.
        betas: Decay of the mean of the gradients, and of the squared gradients.
        eps: Added to the root of the mean of the squared gradients.
        weight_decay: Decoupled weight decay.
        seed: Decides the rounding, together with the parameter's position, its step and the element.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        seed: int,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. ``closure`` is ignored."""
        workspaces: dict[torch.device, _Workspace] = {}
        position = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    if not takes_gpu_path(parameter.device) and parameter.device not in workspaces:
                        workspaces[parameter.device] = _Workspace(parameter.device)
                    self._update(parameter, group, position, workspaces.get(parameter.device))
                position += 1

    def _update(
        self, parameter: Tensor, group: dict[str, Any], position: int, workspace: "_Workspace | None"
    ) -> None:
        """``workspace`` is None on a GPU."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        step = int(state["step"])  # on the CPU: no GPU is waited for
        assert parameter.grad is not None
        gradient = _local(parameter.grad)
        value, mean, square = map(_local, (parameter.detach(), state["exp_avg"], state["exp_avg_sq"]))
        if parameter.dtype is not torch.bfloat16:
            _adamw(value, mean, square, gradient, step=step, group=group)
            return
        keys = _keys(self._seed, step, position)
        if workspace is None:
            settings = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
            _in_one_pass(value, mean, square, gradient.contiguous(), step, *settings, *keys)
        else:
            _in_blocks(value, mean, square, gradient, step=step, group=group, keys=keys, workspace=workspace)


@torch.library.custom_op(
    "dpo_opt::rounded_adamw", mutates_args=("parameter", "exp_avg", "exp_avg_sq"), device_types="cuda"
)
def _in_one_pass(
    parameter: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    first_key: int,
    second_key: int,
) -> None:
    from dpo_opt.optimize.update.rounding_kernel import update

    update(
        parameter, gradient, exp_avg, exp_avg_sq, step=step, lr=lr, betas=(beta1, beta2), eps=eps,
        weight_decay=weight_decay, keys=(first_key, second_key),
    )  # fmt: skip


def _in_blocks(
    parameter: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor,
    *,
    step: int,
    group: dict[str, Any],
    keys: tuple[int, int],
    workspace: "_Workspace",
) -> None:
    """One update of a bfloat16 parameter in place, in torch's own operations."""
    flat, flat_gradient = [t.view(-1) for t in (parameter, exp_avg, exp_avg_sq)], gradient.reshape(-1)
    for block in workspace.blocks(flat[0].numel()):
        parts = [tensor[block] for tensor in flat]
        wide, wide_gradient, noise = workspace.take(len(parts[0]))
        torch._foreach_copy_(list(wide), parts)
        wide_gradient.copy_(flat_gradient[block])
        _adamw(wide[0], wide[1], wide[2], wide_gradient, step=step, group=group)
        workspace.fill_noise(noise, keys, start=block.start)
        # The two moments share random bits: each of them is still right on average.
        _round_into(parts, wide, (noise[0], noise[1], noise[1]))


class _Workspace:
    """Buffers of one device for one block of elements, reused by all blocks of a step."""

    def __init__(self, device: torch.device) -> None:
        self._wide = torch.empty(4, _BLOCK, device=device)
        self._noise = torch.empty(3, _BLOCK, dtype=torch.int32, device=device)
        self._index = torch.arange(_BLOCK, dtype=torch.int32, device=device)

    def blocks(self, count: int) -> Iterator[slice]:
        """Slices that together cover ``count`` elements."""
        return (slice(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK))

    def take(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Views for ``count`` elements: (3, n) values, (n,) gradient, (3, n) int32 noise."""
        return self._wide[:3, :count], self._wide[3, :count], self._noise[:, :count]

    def fill_noise(self, noise: Tensor, keys: tuple[int, int], *, start: int) -> None:
        """Two rows of independent numbers in [0, 65536) for the elements from ``start`` on.

        They are Chris Wellons' 32-bit hash lowbias32 (https://nullprogram.com/blog/2018/07/31/) of the
        element's index. A key is added before each multiplication, so that two parameters' bits are not one
        sequence at two offsets.
        """
        high, scratch = noise[0], noise[1]
        torch.add(self._index[: noise.shape[1]], _signed(start + keys[0]), out=high)
        _fold(high, 16, scratch)
        high.mul_(_signed(0x7FEB352D)).add_(keys[1])
        _fold(high, 15, scratch)
        high.mul_(_signed(0x846CA68B))
        torch.bitwise_right_shift(high, 16, out=scratch)
        scratch.bitwise_and_(0xFFFF)
        high.bitwise_xor_(scratch).bitwise_and_(0xFFFF)


def mixed(*numbers: int) -> int:
    """A 64-bit hash of the numbers, the same on every machine."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def round_stochastically(values: Tensor, *, seed: int, step: int, parameter: int) -> Tensor:
    """Round to bfloat16, up or down at random, so that the mean over seeds is the value itself.

    Values that bfloat16 can hold are returned unchanged, infinities and NaN included. Values beyond its
    largest finite number may become infinite, as with rounding to the nearest.

    Args:
        values: Any shape, float32.
        seed: Decides the random bits, together with ``step`` and ``parameter``.
        step: Number of the update.
        parameter: Position of the parameter.

    Returns:
        The same shape, bfloat16.
    """
    rounded = torch.empty_like(values, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
    flat, result = values.reshape(-1), rounded.view(-1)
    workspace = _Workspace(values.device)
    keys = _keys(seed, step, parameter)
    for block in workspace.blocks(flat.numel()):
        wide, _, noise = workspace.take(len(flat[block]))
        wide[0].copy_(flat[block])
        workspace.fill_noise(noise, keys, start=block.start)
        _round_into([result[block]], wide[:1], (noise[0],))
    return rounded


def _round_into(targets: list[Tensor], values: Tensor, noise: tuple[Tensor, ...]) -> None:
    """Round each row of ``values`` with its own noise into its bfloat16 target. Overwrites ``values``."""
    # CUDA's NaN is 0x7fffffff: adding noise to it would make a number.
    values.nan_to_num_(nan=float("nan"), posinf=float("inf"), neginf=float("-inf"))
    bits = values.view(torch.int32)
    for row, row_noise in zip(bits, noise, strict=True):
        row.add_(row_noise)
    # bfloat16 is the upper half of float32; the larger the lower half, the more often noise carries into it.
    torch.bitwise_right_shift(bits, 16, out=bits)
    torch._foreach_copy_([target.view(torch.int16) for target in targets], list(bits))


def _adamw(
    values: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor, *, step: int, group: dict[str, Any]
) -> None:
    """One AdamW update in place, by the kernel that ``torch.optim.AdamW(fused=True)`` calls."""
    # torch.optim's function around this kernel would sort its arguments by device again for every block.
    torch._fused_adamw_(
        [values],
        [gradient],
        [exp_avg],
        [exp_avg_sq],
        [],
        # Filled on the device: a copy would wait for a GPU's earlier work.
        [torch.full((), float(step), device=gradient.device)],
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _fold(bits: Tensor, shift: int, scratch: Tensor) -> None:
    """``bits ^= bits >> shift`` as if unsigned."""
    torch.bitwise_right_shift(bits, shift, out=scratch)
    scratch.bitwise_and_((1 << (32 - shift)) - 1)
    bits.bitwise_xor_(scratch)


def _keys(seed: int, step: int, parameter: int) -> tuple[int, int]:
    first, second = struct.unpack("<ii", mixed(seed, step, parameter).to_bytes(8, "little"))
    return first, second


def _signed(value: int) -> int:
    """The int32 with the same lower 32 bits."""
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)
