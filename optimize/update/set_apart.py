"""Keeps optimizer state and gradients apart from activations in a CPU's memory.

An allocator puts what is asked for into the gaps that freed activations leave. Gradients and state stay there
while activations come and go around them. The rest of a gap is too small for the next micro-batch, and the
process grows: SmolLM2-135M held 0.35 GB more than was in use. So state and room for gradients are allocated
side by side before the first forward, and a gradient is copied to its place when it is made. The head's is
made there. On a GPU large tensors have pages of their own, and FSDP has its own buffers.
"""

from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dpo_opt.optimize.forward.device_path import takes_gpu_path
from dpo_opt.optimize.forward.gradient_place import give_place
from dpo_opt.optimize.update.optimizer_state import begin_state


def set_apart(optimizer: Optimizer) -> list[Tensor]:
    """Allocate an optimizer's state and room for the gradients of its parameters, on a CPU.

    Args:
        optimizer: Its parameters have no gradients. They may be set to None after each step, as before.

    Returns:
        The room of each parameter's gradient; empty on a GPU and where parameters are sharded.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(takes_gpu_path(p.device) or isinstance(p, DTensor) for p in parameters):
        return []
    # First the state: what its making frees has the shapes of the gradients.
    begin_state(optimizer)
    places = [torch.empty_like(parameter) for parameter in parameters]
    for parameter, place in zip(parameters, places, strict=True):
        give_place(parameter, place)
        parameter.register_post_accumulate_grad_hook(partial(_move, place))
    return places


def _move(place: Tensor, parameter: Tensor) -> None:
    gradient = parameter.grad
    # Later micro-batches of a step are added in place.
    if gradient is not None and gradient is not place:
        parameter.grad = place.copy_(gradient)
