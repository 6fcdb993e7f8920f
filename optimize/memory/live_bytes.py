"""Counts the bytes of tensors that are in use at a time, and which part of training they are of."""

import itertools
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A record of the storages that operations allocate while it is on, until no tensor uses them.

    It also works on tensors without data. What a kernel allocates for itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._part = ""
        self._numbers: dict[int, int] = {}
        self._parts: list[str] = []
        self._sizes: list[int] = []
        # Each change: the storage's number, and the bytes that it takes or gives back.
        self._changes: list[tuple[int, int]] = []
        self._start = 0

    def enter(self, part: str) -> None:
        """What is allocated from here on is of ``part``."""
        self._part = part

    def name(self, tensors: Iterable[Tensor], part: str) -> None:
        """Say which part these tensors are of, whenever they were allocated."""
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            self._parts[self._count(local)] = part

    def start(self) -> None:
        """Look for the peak from here on."""
        self._start = len(self._changes)

    def peak(self) -> dict[str, int]:
        """Bytes of each part, at the first moment when all of them together were the most since ``start``."""
        totals = list(itertools.accumulate(change for _, change in self._changes))
        most = max(range(max(0, self._start - 1), len(totals)), key=totals.__getitem__)
        found = dict.fromkeys(self._parts, 0)
        for number, change in self._changes[: most + 1]:
            found[self._parts[number]] += change
        return found

    def __enter__(self) -> Self:
        # FSDP empties and refills the storages of gathered parameters; no operation shows that.
        self._resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = self._resized(self._resize)  # type: ignore[method-assign]
        return super().__enter__()  # type: ignore[no-untyped-call, no-any-return]

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _resized(self, resize: Callable[..., Any]) -> Any:
        def resize_and_count(storage: torch.UntypedStorage, size: int) -> Any:
            before = storage.nbytes()
            result = resize(storage, size)
            if id(storage) in self._numbers:
                number = self._numbers[id(storage)]
                self._changes.append((number, storage.nbytes() - before))
                self._sizes[number] = storage.nbytes()
            return result

        return resize_and_count

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            result = _grouped_product(*args)
        else:
            result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._numbers:
            number = self._numbers[key] = len(self._parts)
            self._parts.append(self._part)
            self._changes.append((number, storage.nbytes()))
            self._sizes.append(storage.nbytes())
            weakref.finalize(storage, self._freed, key)
        return self._numbers[key]

    def _freed(self, key: int) -> None:
        number = self._numbers.pop(key)
        self._changes.append((number, -self._sizes[number]))


def _grouped_product(left: Tensor, right: Tensor, offsets: Tensor, *_: Any) -> Tensor:
    """The shape of products grouped by expert, which torch knows only in bf16 where there is no data."""
    if right.ndim == 3:
        return left.new_empty(left.shape[0], right.shape[2])
    return left.new_empty(len(offsets), left.shape[0], right.shape[1])
