"""Adapters on a CUDA device: beside bf16 weights, and beside weights in 4 bits (QLoRA)."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo_opt.commands.merge import MergeConfig
from dpo_opt.merge import merge
from dpo_opt.optimize.adapters.lora import (
    add_adapter,
    four_bit_options,
    plan_adapter,
    save_adapter,
    trainable_names,
)
from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.forward.load_policy import load_policy
from dpo_opt.optimize.forward.packing import Group
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.schemas.pairs import TokenSequence

pytest.importorskip("peft")
pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model in bf16."""
    folder = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=BF16).save_pretrained(folder)
    return folder


def groups() -> list[Group]:
    rng = np.random.default_rng(1)

    def ids(count: int) -> np.ndarray:
        return rng.integers(3, 200, size=count).astype(np.int32)

    return [
        tuple(TokenSequence(prompt, ids(length)) for length in lengths)
        for prompt, lengths in ((ids(12), (9, 5)), (ids(30), (23, 18)), (ids(20), (1, 6)))
    ]


def adapt(model: PreTrainedModel, base: Path, **options: Any) -> None:
    config = TrainConfig(
        shards="unused",
        model=str(base),
        output_dir="unused",
        use_peft=True,
        lora_r=4,
        lora_alpha=8,
        **options,
    )
    add_adapter(model, plan_adapter(config, base), seed=3)


def perturb(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def backward(policy: Policy) -> tuple[Tensor, Tensor]:
    """Log-probs, and all gradients as one vector."""
    values = policy.sequence_logps(groups())
    torch.stack([(-1) ** i * v.double().sum() for i, v in enumerate(values)]).sum().backward()
    named = dict(policy.model.named_parameters())
    grads = [named[name].grad for name in trainable_names(policy.model)]
    return torch.cat(values).detach().double().cpu(), torch.cat([g.flatten() for g in grads]).double().cpu()


def assert_alike(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> None:
    """Equal but for bf16's rounding."""
    assert (found[0] - exact[0]).abs().mean() < 0.1
    assert exact[0].std() > 0.5
    assert torch.cosine_similarity(found[1], exact[1], dim=0) > 0.98
    assert abs(float(found[1].norm() / exact[1].norm()) - 1) < 0.05


def test_gradients_beside_bf16_weights_are_those_of_fp32(base: Path, cuda: torch.device) -> None:
    exact = load_policy(base, dtype=torch.float32, device=cuda, trainable=False)
    policy = load_policy(base, dtype=BF16, device=cuda, trainable=False, param_dtype=BF16)
    with torch.no_grad():
        plain = torch.cat(policy.sequence_logps(groups()))
    for each in (exact, policy):
        adapt(each.model, base)
    with torch.no_grad():
        assert (torch.cat(policy.sequence_logps(groups())) - plain).abs().mean() < 0.05
    for each in (exact, policy):
        perturb(each.model)
    found = backward(policy)
    assert {p.dtype for p in policy.model.parameters() if p.requires_grad} == {torch.float32}
    assert_alike(found, backward(exact))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_gradients_beside_weights_in_4_bits_are_those_beside_the_same_weights_unpacked(
    base: Path, tmp_path: Path, cuda: torch.device
) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    options = four_bit_options(cuda, BF16)
    policy = load_policy(base, dtype=BF16, device=cuda, trainable=False, param_dtype=BF16, options=options)
    assert policy.packs
    assert policy.model.get_output_embeddings().weight.dtype == BF16
    quantized = {n: m.weight for n, m in policy.model.named_modules() if isinstance(m, Linear4bit)}
    assert len(quantized) == 14
    with torch.no_grad():
        before = torch.cat(policy.sequence_logps(groups()))

    unpacked = load_policy(base, dtype=torch.float32, device=cuda, trainable=False)
    with torch.no_grad():
        for name, weight in quantized.items():
            unpacked.model.get_submodule(name).weight.copy_(dequantize_4bit(weight.data, weight.quant_state))
    for each in (policy, unpacked):
        adapt(each.model, base, load_in_4bit=True)
    with torch.no_grad():
        assert (torch.cat(policy.sequence_logps(groups())) - before).abs().mean() < 0.05
    for each in (policy, unpacked):
        perturb(each.model)
    assert_alike(backward(policy), backward(unpacked))

    (tmp_path / "adapter").mkdir()
    save_adapter(policy.model, tmp_path / "adapter", base="base", base_weights=None)
    merge(MergeConfig(model=str(base), adapter=tmp_path / "adapter", output=tmp_path / "merged"))
    merged = load_policy(tmp_path / "merged", dtype=BF16, device=cuda, trainable=False, param_dtype=BF16)
    beside = load_policy(base, dtype=BF16, device=cuda, trainable=False, param_dtype=BF16)
    adapt(beside.model, base)
    perturb(beside.model)
    with torch.no_grad():
        difference = torch.cat(merged.sequence_logps(groups())) - torch.cat(beside.sequence_logps(groups()))
    assert difference.abs().mean() < 0.1
