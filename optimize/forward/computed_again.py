"""Results that autograd does not keep: where it would, it keeps what computes them again in backward.

Whatever saves such a result, or a view of it, saves a stand-in. The first that asks for it in backward
computes it, and all others get the same tensor.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Result(Protocol):
    """What can compute a result again."""

    def value(self) -> Tensor:
        """The result, bit for bit; computed at the first call."""


def computes_again() -> bool:
    """Whether a forward runs whose results may be stood for."""
    return _results.get() is not None and torch.is_grad_enabled()


def watched(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``forward(*args, **kwargs)``, in which results may be stood for."""
    token = _results.set({})
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            return forward(*args, **kwargs)
    finally:
        _results.reset(token)


def stand_for(value: Tensor, result: Result) -> None:
    """From now on the running forward keeps ``result`` where autograd would keep ``value``."""
    results = _results.get()
    assert results is not None
    storage = value.untyped_storage()
    # The reference keeps the storage's number from being given to another.
    here = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
    results[storage._cdata] = _Made(result, here, value.dtype, value._version)


class Kept:
    """An input of a result, kept for the backward as autograd would keep it."""

    def __init__(self, tensor: Tensor) -> None:
        self._packed = _pack(tensor.detach())
        self._version = tensor._version

    def tensor(self) -> Tensor:
        """The input.

        Raises:
            RuntimeError: It was changed in place since the forward.
        """
        if isinstance(self._packed, Tensor) and self._packed._version != self._version:
            raise RuntimeError("a tensor that backward needs was changed in place")
        return _unpack(self._packed)


class _Made(NamedTuple):
    """Where a result lies during the forward."""

    result: Result
    storage: StorageWeakRef
    dtype: torch.dtype
    version: int


class _View(NamedTuple):
    """Stands for a tensor that is a result, or a view of one."""

    result: Result
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


_results: ContextVar[dict[int, _Made] | None] = ContextVar("results", default=None)
"""The results of the running forward, by their storage."""


def _pack(tensor: Tensor) -> Tensor | _View:
    made = (_results.get() or {}).get(tensor.untyped_storage()._cdata)
    if made is None or (tensor.dtype, tensor._version) != (made.dtype, made.version):
        return tensor
    return _View(made.result, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def _unpack(packed: Tensor | _View) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    return packed.result.value().detach().as_strided(packed.size, packed.stride, packed.offset)
