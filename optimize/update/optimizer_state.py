"""An optimizer's state as plain named tensors, which a checkpoint stores without pickle and loads again.

``state_dict`` numbers its parameters and keeps tensor subclasses, so it fits neither safetensors nor a model
whose parameters come in another order.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dpo_opt.optimize.update.optimizer import set_group_rate, set_learning_rate


def optimizer_tensors(optimizer: Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The optimizer's state: everything a step changes besides the parameters, as ``{parameter}.{entry}``.

    Args:
        optimizer: Any optimizer. Parameters that had no gradient yet get the state they would begin with.
        names: From every parameter of the optimizer to its name in the model.

    Returns:
        The optimizer's own tensors, not copies: store them before the next step, or read into them. A
        quantized entry is given as its parts, ``{parameter}.{entry}.{part}``.
    """
    begin_state(optimizer)
    found: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for entry, value in optimizer.state[parameter].items():
                found |= _parts(f"{names[parameter]}.{entry}", value)
    return found


def begin_state(optimizer: Optimizer) -> None:
    """Give parameters without state their initial state, by a step with zero gradients and learning rate 0.

    Only the optimizer knows what its state looks like, and it creates the state in its first step
    (``torch.distributed.checkpoint`` does the same).
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    fresh = [p for p in parameters if not optimizer.state.get(p)]
    if not fresh:
        return
    gradients = [p.grad for p in parameters]
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    try:
        for parameter in parameters:
            parameter.grad = None
        for parameter in fresh:
            parameter.grad = torch.zeros_like(parameter)
        set_learning_rate(optimizer, 0.0)
        optimizer.step()
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            set_group_rate(group, rate)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
    for parameter in fresh:
        for value in optimizer.state[parameter].values():
            if not _is_quantized(value):  # quantized moments are zero already
                value.zero_()


def _parts(name: str, value: Tensor) -> dict[str, Tensor]:
    if not _is_quantized(value):
        return {name: value}
    attributes, _ = value.__tensor_flatten__()  # type: ignore[attr-defined]
    return {f"{name}.{attribute}": getattr(value, attribute) for attribute in attributes}


def _is_quantized(value: Tensor) -> bool:
    return hasattr(value, "__tensor_flatten__") and not isinstance(value, DTensor)
