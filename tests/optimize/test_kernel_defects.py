"""What tests/gpu asserts of loading, on a CPU: it passes a sound fused kernel and notices planted defects."""

from pathlib import Path

import pytest
import torch
from kernel_defects import KERNEL, TIES, assert_loads, assert_noticed, save
from torch import Tensor
from varlen_reference import written_out

from dpo_opt.optimize.forward import attention, varlen
from dpo_opt.optimize.forward.varlen import attention_dtype

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: half precision goes through the fused kernel, fp32 does not."""

    def takes(query: Tensor, _: Tensor) -> bool:
        return attention_dtype(query) == torch.bfloat16

    monkeypatch.setattr(attention, "takes_varlen", takes)
    monkeypatch.setattr(varlen, "_KERNEL", written_out)


@pytest.mark.parametrize("ties", TIES)
def test_a_sound_kernel_passes(tiny_model: Path, tmp_path: Path, ties: str) -> None:
    assert_loads(save(tiny_model, tmp_path, ties=ties), CPU)


@pytest.mark.parametrize("name", KERNEL)
def test_a_defect_of_the_kernel_is_noticed(tiny_model: Path, tmp_path: Path, name: str) -> None:
    assert_noticed(name, save(tiny_model, tmp_path, ties="tied"), CPU)
