"""The automatic budget on a CUDA device: what it chooses fits, and fills what is free."""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_opt.optimize.forward.load_policy import load_policy
from dpo_opt.optimize.forward.packing import Group, packed_size
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.memory.budget import MOST_ROWS, choose_budget
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.pairs import TokenSequence

pytestmark = pytest.mark.gpu


@pytest.fixture
def policy(cuda: torch.device, tmp_path: Path) -> Policy:
    """A Llama whose activations outweigh its weights."""
    config = LlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return load_policy(tmp_path, dtype=torch.bfloat16, device=cuda, trainable=True)


def group(length: int) -> Group:
    ids = np.random.default_rng(0).integers(0, 1000, size=length + 1).astype(np.int32)
    return (TokenSequence(ids[:8], ids[8:]), TokenSequence(ids[:8], ids[8:][::-1].copy()))


def left(policy: Policy, size: int) -> torch.Tensor:
    """Takes all of the device but ``size`` bytes, for as long as it is held."""
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(policy.device)
    return torch.empty(free - size, dtype=torch.uint8, device=policy.device)


def test_the_budget_fits_and_leaves_no_gradient(policy: Policy) -> None:
    longest = group(400)
    held = left(policy, 4 * 10**9)
    budget = choose_budget(policy, longest)
    rows = packed_size(longest)
    assert rows <= budget <= MOST_ROWS
    assert all(parameter.grad is None for parameter in policy.model.parameters())
    policy.batch_logps(policy.layout([longest] * (budget // rows)).to(policy.device)).sum().backward()
    assert held.numel() > 0


def test_less_memory_is_a_smaller_budget(policy: Policy) -> None:
    found = []
    for size in (6 * 10**9, 2 * 10**9):
        held = left(policy, size)
        found.append(choose_budget(policy, group(300)))
        del held
    assert found[0] > found[1]


def test_a_pair_that_does_not_fit_is_refused(policy: Policy) -> None:
    held = left(policy, 10**9)
    with pytest.raises(ConfigError, match="does not fit on the device"):
        choose_budget(policy, group(20_000))
    assert held.numel() > 0
