"""Sets the precision of a forward: its dtype, fp32 products without TF32, half precision widened to fp32."""

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo_opt.optimize.forward.architecture import decoder_layers
from dpo_opt.optimize.forward.around_forward import around_forward

HALF = (torch.bfloat16, torch.float16)

_backends: Any = torch.backends  # its attributes are made at run time
# The backends of matrix products and convolutions, on a CUDA device and on a CPU.
_BACKENDS = (
    _backends.cuda.matmul,
    _backends.cudnn.conv,
    _backends.mkldnn.matmul,
    _backends.mkldnn.conv,
)


def computing_in(dtype: torch.dtype, model: torch.nn.Module, device: torch.device) -> torch.autocast:
    """A context in which the model computes in ``dtype``, whatever its parameters are stored in."""
    mixed = dtype != torch.float32 and any(parameter.dtype != dtype for parameter in model.parameters())
    # Each weight is used once per forward: cached casts would only keep a second copy of the model.
    return torch.autocast(device.type, dtype=dtype, enabled=mixed, cache_enabled=False)


def narrow_products(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Store in ``dtype`` the weights that autocast would round to it at every use, and all others in fp32.

    The log-probs are bit by bit those of fp32 parameters that compute in ``dtype``, in about half the memory.
    So is the choice of experts, which the last bit can change. Experts stay in fp32, because transformers
    computes them in the dtype that they are stored in.
    """
    head = model.get_output_embeddings()
    for module in model.modules():
        narrow = isinstance(module, torch.nn.Linear | Conv1D) and module is not head
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype if narrow else torch.float32)


@contextlib.contextmanager
def full_precision_products() -> Iterator[None]:
    """Fp32 products use neither TF32 nor bf16 while the block runs.

    Containers and libraries switch them on for a whole process (``TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1``,
    ``torch.set_float32_matmul_precision``), and torch itself does so for convolutions. Log-probs would be off
    by 0.01 nats, and would depend on how the process was started.
    """
    before = [backend.fp32_precision for backend in _BACKENDS]
    for backend in _BACKENDS:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(_BACKENDS, before, strict=True):
            backend.fp32_precision = precision


@contextlib.contextmanager
def in_fp32(model: torch.nn.Module) -> Iterator[None]:
    """The model computes in fp32 while the block runs, whatever it is stored in.

    A half-precision model is widened one layer at a time; the stored numbers are put back unchanged.
    """
    layers = list(decoder_layers(model))
    of_layers = {id(tensor) for layer in layers for tensor in _tensors(layer)}
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(around_forward(layer, partial(_widened_layer, layer)))
        with _widened(tensor for tensor in _tensors(model) if id(tensor) not in of_layers):
            yield


def _widened_layer(layer: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
    # Asked for at each forward: a layer may get other parameters for each.
    return _widened(_tensors(layer))


def _tensors(module: torch.nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


@contextlib.contextmanager
def _widened(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Half-precision tensors are fp32 while the block runs; then they hold the same data as before."""
    stored = []
    for tensor in tensors:
        if tensor.dtype in HALF:
            stored.append((tensor, tensor.data))
            tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, data in stored:
            tensor.data = data
