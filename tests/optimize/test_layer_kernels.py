"""Kernels that a Llama layer starts on a GPU, counted on tensors without data: forward, and backward.

docs/memory.md has these numbers. Operations that only look at a tensor in another way start none.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from architectures import HEADS, groups
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from dpo_opt.optimize.forward.activations import checkpoint_activations
from dpo_opt.optimize.forward.architecture import decoder_of
from dpo_opt.optimize.forward.attention import without_kept_masks
from dpo_opt.optimize.forward.device_path import standing_for_gpu
from dpo_opt.optimize.forward.layout import layout_by_structure
from dpo_opt.optimize.forward.narrow_linear import round_weights_at_use
from dpo_opt.optimize.forward.policy import Policy

CPU, BF16, FP32 = torch.device("cpu"), torch.bfloat16, torch.float32
# Views by another name, memory without a kernel, and questions.
NO_KERNEL = ("empty", "detach", "_unsafe_view", "device", "scalar_tensor", "sym_")


class Kernels(TorchDispatchMode):
    """Counts the operations that start a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.started: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        if not operation.is_view and not any(word in name for word in NO_KERNEL):
            self.started[name] += 1
        return operation(*args, **(kwargs or {}))


def model_of(layers: int, stored: torch.dtype) -> PreTrainedModel:
    config = LlamaConfig(**{**HEADS, "num_hidden_layers": layers})
    return AutoModelForCausalLM.from_config(config, dtype=stored).eval()


def counted(model: PreTrainedModel, stored: torch.dtype, mode: Any) -> tuple[Counter[str], Counter[str]]:
    """Kernels of a step with packed rows, computing in bf16."""
    packs = layout_by_structure(model, CPU, BF16)
    assert packs
    if stored != BF16:
        round_weights_at_use(decoder_of(model), BF16)
    checkpoint_activations(model, mode)
    policy = Policy(model, CPU, BF16, packs)
    batch = policy.layout(groups())
    with Kernels() as forward:
        logps = policy.batch_logps(batch)
    return forward.started, of_backward(logps)


def counted_as_written(model: PreTrainedModel, stored: torch.dtype) -> tuple[Counter[str], Counter[str]]:
    """Kernels of transformers' own layers, on padded rows."""
    ids = torch.zeros(4, 32, dtype=torch.int64)
    mixed = torch.autocast("cpu", BF16, enabled=stored != BF16, cache_enabled=False)
    with mixed, Kernels() as forward:
        states = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    return forward.started, of_backward(states)


def of_backward(result: Tensor) -> Counter[str]:
    with Kernels() as backward:
        torch.autograd.backward(result.sum())
    return backward.started


def per_layer(stored: torch.dtype, mode: str | None) -> tuple[Counter[str], Counter[str]]:
    """What one layer more starts. ``mode``: of recomputation; None: the model as transformers has it."""
    found = []
    for layers in (2, 3):
        with without_kept_masks(), standing_for_gpu(), FakeTensorMode(allow_non_fake_inputs=True):
            model = model_of(layers, stored)
            found.append(counted_as_written(model, stored) if mode is None else counted(model, stored, mode))
    (forward, backward), (more_forward, more_backward) = found
    return more_forward - forward, more_backward - backward


@pytest.mark.parametrize(
    ("stored", "mode", "forward", "backward"),
    [
        pytest.param(FP32, "none", 50, 109, marks=pytest.mark.slow),
        (FP32, "selective", 50, 101),
        pytest.param(FP32, "full", 50, 158, marks=pytest.mark.slow),
        pytest.param(BF16, "none", 40, 81, marks=pytest.mark.slow),
        (BF16, "selective", 40, 79),
        pytest.param(BF16, "full", 40, 119, marks=pytest.mark.slow),
    ],
)
def test_a_layer_starts_no_more_kernels_than_the_page_says(
    stored: torch.dtype, mode: str, forward: int, backward: int
) -> None:
    found = per_layer(stored, mode)
    assert sum(found[0].values()) <= forward
    assert sum(found[1].values()) <= backward
    assert sum(found[0].values()) <= sum(per_layer(stored, None)[0].values())
    # Seven projections, and two products of each in the backward; all but `full` compute none of them again.
    assert found[0]["mm"] == 7
    assert found[1]["mm"] >= 20 if mode == "full" else found[1]["mm"] == 14


def test_a_kernel_more_is_counted() -> None:
    tensor = torch.ones(3)
    with Kernels() as kernels:
        tensor.view(3, 1).neg()
    assert kernels.started == {"neg": 1}
