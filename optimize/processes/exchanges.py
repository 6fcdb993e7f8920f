"""Counts what FSDP exchanges in a micro-batch, so that a process which broke off can make what is left.

All processes exchange the same tensors in the same order in every micro-batch, however few rows it has. One
that ran out of memory in the middle of it computes the smallest micro-batch instead. Of that it leaves out as
many exchanges as it had made, and makes the others, for which the other processes wait.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter


class Exchanges:
    """What FSDP exchanges, counted from the beginning of a micro-batch."""

    def __init__(self) -> None:
        self._made = 0
        self._left_out = 0

    def attach(self, module: FSDPModule) -> None:
        """Count what this module exchanges from here on."""
        module.set_custom_all_gather(_AllGather(self))
        module.set_custom_reduce_scatter(_ReduceScatter(self))

    def begin(self) -> None:
        """A micro-batch begins."""
        self._made = self._left_out = 0

    def leave_out_made(self) -> None:
        """The micro-batch is computed again: what was exchanged already is not exchanged twice."""
        self._left_out = self._made

    def make(self, output: Tensor, exchange: Callable[[], dist.Work | None]) -> dist.Work | None:
        """Make an exchange, or leave it out: its output is then zeros."""
        if self._left_out > 0:
            self._left_out -= 1
            output.zero_()
            return None
        work = exchange()
        self._made += 1
        return work


class _AllGather(DefaultAllGather):
    """As FSDP's own, but for what is left out."""

    def __init__(self, exchanges: Exchanges) -> None:
        self._exchanges = exchanges

    def __call__(self, output_tensor: Tensor, *args: Any, **settings: Any) -> Any:
        exchange = partial(super().__call__, output_tensor, *args, **settings)
        return self._exchanges.make(output_tensor, exchange)


class _ReduceScatter(DefaultReduceScatter):
    """As FSDP's own, but for what is left out."""

    def __init__(self, exchanges: Exchanges) -> None:
        self._exchanges = exchanges

    def __call__(self, output_tensor: Tensor, *args: Any, **settings: Any) -> Any:
        exchange = partial(super().__call__, output_tensor, *args, **settings)
        return self._exchanges.make(output_tensor, exchange)
