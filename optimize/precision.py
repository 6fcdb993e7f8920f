"""What numbers are computed in: the dtype of a forward, and the digits of fp32 products."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_backends: Any = torch.backends  # whose attributes are made at run time
# What computes products of matrices, and convolutions: of a CUDA device, and of a CPU.
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


@contextlib.contextmanager
def full_precision_products() -> Iterator[None]:
    """No TF32 and no bf16 inside of fp32 products while the block runs.

    Containers and libraries switch them on for a whole process (``TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1``,
    ``torch.set_float32_matmul_precision``), and torch itself does for convolutions: log-probs would be off by
    0.01 nats, and would depend on who started the process.
    """
    before = [backend.fp32_precision for backend in _BACKENDS]
    for backend in _BACKENDS:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(_BACKENDS, before, strict=True):
            backend.fp32_precision = precision
