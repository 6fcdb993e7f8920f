"""Lets each forward of a layer run inside a context, such as one in which its weights are there or wider."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def around_forward(
    layer: torch.nn.Module, entered: Callable[[], contextlib.AbstractContextManager[None]]
) -> Iterator[None]:
    """Each forward of a layer enters a new context before it and leaves it after it, while the block runs."""
    running = contextlib.ExitStack()

    def before(*_: Any) -> None:
        running.enter_context(entered())

    def after(*_: Any) -> None:
        running.close()

    hooks = (layer.register_forward_pre_hook(before), layer.register_forward_hook(after, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
