"""fp32 products with all of fp32's digits, whatever the process was started with."""

import contextlib
from collections.abc import Iterator

import torch

# What computes products of matrices, and convolutions: of a CUDA device, and of a CPU.
_BACKENDS = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,
    torch.backends.mkldnn.matmul,
    torch.backends.mkldnn.conv,
)


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
