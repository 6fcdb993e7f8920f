"""Where the gradient of a parameter is to lie, for a backward that adds to it there.

Autograd makes a gradient, keeps it until it has all others of the parameter, and then adds it. The head's is
the largest of all: for SmolLM2-135M 0.11 GB, which lay there during the backward of every layer.
"""

from typing import Any

import torch
from torch import Tensor


def give_place(parameter: Tensor, place: Tensor) -> None:
    """Name the place: of the parameter's shape and dtype, its content nothing until ``grad`` is set to it."""
    held: Any = parameter
    held.gradient_place = place


def gradient_place(parameter: Tensor) -> Tensor | None:
    """The place that the parameter was given, if it is one for sums in fp32."""
    place: Tensor | None = getattr(parameter, "gradient_place", None)
    return place if place is not None and place.dtype == parameter.dtype == torch.float32 else None
