"""Loading a model on a CUDA device passes torch's fused kernel, and notices defects planted in it."""

from pathlib import Path

import pytest
import torch
from kernel_defects import KERNEL, TIES, assert_loads, assert_noticed, save

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("ties", TIES)
def test_the_forward_in_bf16_is_that_in_fp32(
    cuda: torch.device, tiny_model: Path, tmp_path: Path, ties: str
) -> None:
    assert_loads(save(tiny_model, tmp_path, ties=ties), cuda)


@pytest.mark.parametrize("name", KERNEL)
def test_a_defect_of_the_kernel_is_noticed(
    cuda: torch.device, tiny_model: Path, tmp_path: Path, name: str
) -> None:
    assert_noticed(name, save(tiny_model, tmp_path, ties="tied"), cuda)
