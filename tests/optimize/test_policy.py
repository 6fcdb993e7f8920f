"""Log-probs and gradients against each architecture's own full-logit forward, one sequence at a time."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import CPU, HEADS, PACKED, PADDED, SIZES, STATES, contrast, groups, load, save_random
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo_opt.optimize.logps import Objective
from dpo_opt.optimize.packing import Segment, pack
from dpo_opt.optimize.policy import Policy, compute_dtype, head_of
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.pairs import TokenSequence

FullLogps = Callable[[PreTrainedModel, TokenSequence], Tensor]

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon-h1": ("FalconH1Config", {**SIZES, **STATES, "mamba_d_ssm": 128, "lm_head_multiplier": 0.5}),
    "recurrent-gemma": (
        "RecurrentGemmaConfig",
        {
            **{k: v for k, v in SIZES.items() if k != "max_position_embeddings"},
            "lru_width": 64,
            "attention_window_size": 25,
        },
    ),
    "llama4": (
        "Llama4TextConfig",
        {**HEADS, "intermediate_size_mlp": 96, "num_local_experts": 4, "attention_chunk_size": 25},
    ),
}


def assert_exact(folder: Path, full_logps: FullLogps) -> Policy:
    """The policy's log-probs and gradients are those of separate forwards through full logits."""
    policy = load(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = [full_logps(stock, sequence) for group in groups() for sequence in group]
    contrast(expected).backward()
    found = policy.sequence_logps(groups())
    contrast(found).backward()

    assert torch.cat(expected).std() > 0.2
    for mine, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=0, atol=1e-4)
    own = dict(policy.model.named_parameters())
    exact_grads = {n: p.grad for n, p in stock.named_parameters() if p.grad is not None}
    largest = max(float(grad.abs().max()) for grad in exact_grads.values())
    assert largest > 1
    assert {n for n, p in own.items() if p.grad is not None} == set(exact_grads)
    for name, exact in exact_grads.items():
        torch.testing.assert_close(
            own[name].grad, exact, rtol=0, atol=1e-4 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )
    return policy


@pytest.mark.parametrize("name", PACKED)
def test_packing_and_sharing_change_neither_log_probs_nor_gradients(
    tmp_path: Path, full_logps: FullLogps, name: str
) -> None:
    save_random(*PACKED[name], tmp_path)
    policy = assert_exact(tmp_path, full_logps)
    assert policy.packs
    with torch.no_grad():
        batch = pack(groups())
        right = policy.batch_logps(batch)
        # The same rows, the other sequences cut off from their prefix: were this equal, nothing was tested.
        segments = tuple(Segment(s.start, s.stop, s.start, s.start) for s in batch.model_kwargs["segments"])
        batch.model_kwargs["segments"] = segments
        assert (policy.batch_logps(batch) - right).abs().max() > 0.05


@pytest.mark.parametrize("name", PADDED)
def test_models_whose_prefix_cannot_be_shared_use_padded_rows_and_are_exact(
    tmp_path: Path, full_logps: FullLogps, name: str
) -> None:
    save_random(*PADDED[name], tmp_path)
    policy = assert_exact(tmp_path, full_logps)
    assert not policy.packs


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_reproduced_are_refused(tmp_path: Path, name: str) -> None:
    save_random(*REFUSED[name], tmp_path)
    with pytest.raises(ConfigError, match="cannot be reproduced from its hidden states") as caught:
        load(tmp_path)
    assert "supported architecture" in str(caught.value)


def test_the_chosen_completion_does_not_reach_the_rejected_one(policy: Policy) -> None:
    prompt, chosen, rejected = (np.array(ids, dtype=np.int32) for ids in ([0, 7, 8], [9, 10, 11], [12, 13]))
    other = np.array([14, 15, 16], dtype=np.int32)
    with torch.no_grad():
        first, second = (
            policy.sequence_logps([(TokenSequence(prompt, c), TokenSequence(prompt, rejected))])
            for c in (chosen, other)
        )
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], second[0])


def test_batch_composition_does_not_matter(policy: Policy) -> None:
    with torch.no_grad():
        together = policy.sequence_logps(groups())
        alone = [logps for group in groups() for logps in policy.sequence_logps([group])]
    for mine, exact in zip(together, alone, strict=True):
        torch.testing.assert_close(mine, exact, rtol=0, atol=1e-5)


def test_bins_of_padded_models_count_the_padding(policy: Policy) -> None:
    padded = Policy(policy.model, CPU, torch.float32, packs=False)
    long_and_short = [groups()[1], *[groups()[2]] * 6]
    # 2 x 41 rows, then 2 x 6 each: 82 + 72 without padding, 14 x 41 with it.
    assert len(policy.bins(long_and_short, 160)) == 1
    assert padded.bins(long_and_short, 160) == [[0], [1, 2, 3, 4, 5, 6]]


def test_dropout_is_off(tmp_path: Path, full_logps: FullLogps) -> None:
    save_random("LlamaConfig", {**HEADS, "attention_dropout": 0.5}, tmp_path)
    assert_exact(tmp_path, full_logps)


def test_bf16_computes_on_fp32_masters(tiny_model: Path) -> None:
    exact = load(tiny_model).sequence_logps(groups())
    policy = load(tiny_model, dtype=torch.bfloat16)
    found = policy.sequence_logps(groups())
    contrast(found).backward()
    assert policy.packs
    for parameter in policy.model.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
    difference = (torch.cat(found) - torch.cat(exact)).abs()
    assert 1e-4 < difference.max() < 0.2


def test_a_frozen_bf16_model_packs_and_takes_no_gradient(tiny_model: Path) -> None:
    policy = load(tiny_model, dtype=torch.bfloat16, trainable=False)
    assert policy.packs
    assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16}
    found = policy.sequence_logps(groups())
    assert not found[0].requires_grad
    exact = torch.cat(load(tiny_model).sequence_logps(groups()))
    assert 1e-4 < (torch.cat(found) - exact).abs().max() < 0.5


def test_the_head_is_the_models_own_parameter(tmp_path: Path) -> None:
    save_random("LlamaConfig", {**HEADS, "tie_word_embeddings": True}, tmp_path)
    model = load(tmp_path).model
    assert head_of(model).weight is model.get_input_embeddings().weight


def test_dtype_auto_is_fp32_on_a_cpu_and_bf16_on_a_gpu() -> None:
    assert compute_dtype("auto", CPU) == torch.float32
    assert compute_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert compute_dtype("bfloat16", CPU) == torch.bfloat16


def test_an_unknown_architecture_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no-such-model"}))
    with pytest.raises(ConfigError, match="transformers cannot load the model"):
        load(folder)


def test_a_checkpoint_without_all_weights_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"lacks 1 of the model's weights, such as model\.layers\.1\.mlp\.up"
    ):
        load(folder)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_gradients_taken_in_the_head_are_those_of_backward(
    tmp_path: Path, *, tied: bool, in_place: bool
) -> None:
    save_random("LlamaConfig", {**HEADS, "tie_word_embeddings": tied}, tmp_path)
    policy = load(tmp_path)
    pairs = groups()[:4]  # the last group has four sequences
    batch = policy.layout(pairs)
    lengths = [sum(batch.lengths[i : i + 2]) for i in range(0, 8, 2)]
    starts = np.cumsum([0, *lengths])

    def value(logps: Tensor, rows: slice) -> Tensor:
        weights = torch.cos(torch.arange(starts[rows.start], starts[rows.stop]))
        return (weights * logps).sum()

    def grads(objective: Objective | None) -> dict[str, Tensor]:
        policy.model.zero_grad()
        for _ in range(2):  # micro-batches
            value(policy.batch_logps(batch, objective=objective), slice(0, 4)).backward()
        found = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
        assert not any(grad.is_sparse for grad in found.values())
        return found

    expected = grads(None)
    found = grads(Objective(lengths, value, in_place))
    assert found.keys() == expected.keys()
    for name, exact in expected.items():
        torch.testing.assert_close(
            found[name],
            exact,
            rtol=0,
            atol=1e-5 * float(exact.abs().max()),
            msg=lambda m, n=name: f"{n}: {m}",
        )
