"""An optimizer's state as plain named tensors: what a checkpoint stores without pickle, and fills again.

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
    """Everything a step changes beside the parameters, under ``{parameter}.{entry}``.

    Args:
        optimizer: Any; parameters that had no gradient yet get the state they would begin with.
        names: Every parameter of the optimizer, and its name in the model.

    Returns:
        The optimizer's own tensors, not copies: store them before the next step, or read into them. A
        quantized entry stands as its parts, ``{parameter}.{entry}.{part}``.
    """
    _begin(optimizer)
    found: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for entry, value in optimizer.state[parameter].items():
                found |= _parts(f"{names[parameter]}.{entry}", value)
    return found


def _begin(optimizer: Optimizer) -> None:
    """Give parameters without state the one they would begin with, by an update of nothing.

    Only the optimizer knows how its state looks, and it makes one at its first step only (the same way is
    taken by ``torch.distributed.checkpoint``).
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
            if not _is_quantized(value):  # those are zero already, in their own way
                value.zero_()


def _parts(name: str, value: Tensor) -> dict[str, Tensor]:
    if not _is_quantized(value):
        return {name: value}
    attributes, _ = value.__tensor_flatten__()  # type: ignore[attr-defined]
    return {f"{name}.{attribute}": getattr(value, attribute) for attribute in attributes}


def _is_quantized(value: Tensor) -> bool:
    return hasattr(value, "__tensor_flatten__") and not isinstance(value, DTensor)
