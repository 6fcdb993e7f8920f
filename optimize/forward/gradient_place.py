"""Where the gradient of a parameter is to lie, for a backward that adds to it there.

Autograd makes a gradient, keeps it until it has all others of the parameter, and then adds it. The head's is
the largest of all: for SmolLM2-135M 0.11 GB, which lay there during the backward of every layer.
"""

from typing import Any

import torch
from torch import Tensor

CACHED_ROWS = 2048
"""Rows of a weight or its gradient, of which a part stays in a CPU's cache: of SmolLM2's, 2 MB in bf16."""


def give_place(parameter: Tensor, place: Tensor) -> None:
    """Name the place: of the parameter's shape and dtype, its content nothing until ``grad`` is set to it."""
    held: Any = parameter
    held.gradient_place = place


def gradient_place(parameter: Tensor) -> Tensor | None:
    """The place that the parameter was given, if it is one for sums in fp32."""
    place: Tensor | None = getattr(parameter, "gradient_place", None)
    return place if place is not None and place.dtype == parameter.dtype == torch.float32 else None


def add_product(parameter: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to the gradient of a parameter that has a place.

    Args:
        parameter: (N, D).
        left: (N, R), in the dtype of the product.
        right: (R, D), in the same.
    """
    place = gradient_place(parameter)
    assert place is not None
    sum_product(place, left, right, begun=parameter.grad is place)
    parameter.grad = place


def sum_product(total: Tensor, left: Tensor, right: Tensor, *, begun: bool) -> None:
    """``total += left @ right`` on a CPU. Products in half precision are rounded to it before they are added.

    Args:
        total: (N, D) float32.
        left: (N, R), in the dtype of the product.
        right: (R, D), in the same.
        begun: Whether ``total`` holds a sum. If not, it is overwritten.
    """
    for rows, into in zip(torch.split(left, CACHED_ROWS), torch.split(total, CACHED_ROWS), strict=True):
        if left.dtype == torch.float32:
            into.addmm_(rows, right, beta=int(begun))
        elif begun:
            into.add_(torch.mm(rows, right))
        else:
            into.copy_(torch.mm(rows, right))
