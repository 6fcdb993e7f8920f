"""Tests of what only a CUDA device computes; elsewhere they skip (see the rules in tests/conftest.py).

pytest -m gpu tests/gpu
"""

import pytest
import torch


@pytest.fixture
def cuda() -> torch.device:
    """The device; products of fp32 numbers stay fp32 on it."""
    assert not torch.backends.cuda.matmul.allow_tf32
    return torch.device("cuda")
