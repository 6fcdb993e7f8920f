"""Checkpointed layers: the same numbers bit for bit, less kept, more computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from architectures import HEADS, PACKED, PADDED, contrast, groups, load, save_random
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_opt.optimize.forward.activations import checkpoint_activations
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.schemas.errors import ConfigError

Mode = Literal["none", "selective", "full"]
ARCHITECTURES = {
    name: PACKED[name]
    for name in (
        *("llama", "qwen3", "qwen3-moe", "mistral-windowed", "gemma3-windowed"),
        *("gemma2-softcapped", "gpt-oss-sinks"),
    )
} | {"mamba": PADDED["mamba"]}


def checkpointed(folder: Path, mode: Mode) -> Policy:
    policy = load(folder)
    checkpoint_activations(policy.model, mode)
    return policy


def gradients(policy: Policy) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    logps = policy.sequence_logps(groups())
    contrast(logps).backward()
    named = policy.model.named_parameters()
    return [v.detach() for v in logps], {n: p.grad for n, p in named if p.grad is not None}


class Operations(TorchDispatchMode):
    """Counts calls of operations, and remembers what they made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self, policy: Policy) -> int:
        """Bytes of what was made and still exists, parameters left out."""
        parameters = {p.untyped_storage()._cdata for p in policy.model.parameters()}
        return sum(
            size
            for key, (storage, size) in self._made.items()
            if key not in parameters and not storage.expired()
        )


@contextmanager
def kept_by_autograd() -> Iterator[dict[int, int]]:
    """Bytes of every storage that autograd itself saves; a checkpointed layer's do not go through here."""
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probs_and_gradients_are_the_same(tmp_path: Path, name: str, mode: Mode) -> None:
    """Bit by bit, but that a norm gives its input one gradient, where autograd adds its parts one by one."""
    save_random(*ARCHITECTURES[name], tmp_path)
    expected_logps, expected = gradients(load(tmp_path))
    logps, found = gradients(checkpointed(tmp_path, mode))
    assert all(torch.equal(a, b) for a, b in zip(logps, expected_logps, strict=True))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        size = float(expected[name].abs().max())
        difference = float((gradient - expected[name]).abs().max())
        assert difference <= (2e-6 * size if mode == "selective" else 0), name
    assert max(float(grad.abs().max()) for grad in found.values()) > 1


def measured(policy: Policy) -> tuple[int, dict[str, int], dict[str, int]]:
    """Bytes kept after a forward; operations of the forward; operations of the backward."""
    batch = policy.layout(groups())
    with Operations() as forward:
        logps = policy.batch_logps(batch)
    kept = forward.alive(policy)
    with Operations() as backward:
        logps.sum().backward()
    return kept, forward.calls, backward.calls


def test_what_is_kept_shrinks_and_what_is_computed_again_is_what_was_promised(tmp_path: Path) -> None:
    save_random("LlamaConfig", {**HEADS, "num_hidden_layers": 4}, tmp_path)
    kept, forward, backward = {}, {}, {}
    modes: tuple[Mode, ...] = ("none", "selective", "full")
    for mode in modes:
        kept[mode], forward[mode], backward[mode] = measured(checkpointed(tmp_path, mode))
    assert kept["full"] < 0.3 * kept["none"]
    assert kept["full"] < kept["selective"] < 0.56 * kept["none"]
    assert forward["none"]["mm"] == forward["selective"]["mm"] == forward["full"]["mm"]
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    again = {mode: backward[mode].get(attention, 0) for mode in modes}
    assert (again["none"], again["selective"], again["full"]) == (0, 0, forward["full"][attention])
    assert backward["selective"]["mm"] == backward["none"]["mm"]
    # All of a layer's seven products but the last, which nothing in backward reads.
    assert backward["full"]["mm"] == backward["none"]["mm"] + 4 * 6
    # SwiGLU is computed again in both, once each. Selective keeps the root mean square of every row.
    assert [backward[mode].get("silu", 0) for mode in modes] == [0, 4, 4]
    assert [backward[mode].get("rsqrt", 0) for mode in modes] == [0, 0, 2 * 4]


def test_full_keeps_one_hidden_state_per_layer(tmp_path: Path) -> None:
    save_random("LlamaConfig", {**HEADS, "num_hidden_layers": 4}, tmp_path)
    policy = checkpointed(tmp_path, "full")
    batch = policy.layout(groups())
    rows = batch.input_ids.numel()
    with kept_by_autograd() as one:
        policy.batch_logps(batch)
    policy = checkpointed(tmp_path, "none")
    with kept_by_autograd() as all_of_it:
        policy.batch_logps(batch)
    weights = {p.untyped_storage()._cdata for p in policy.model.parameters()}
    plain = sum(size for key, size in all_of_it.items() if key not in weights)
    # The inputs of 4 layers, and what embedding, last norm and head keep.
    assert 4 * rows * 64 * 4 <= sum(one.values()) < plain / 3 + 101 * 64 * 4


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_dropout_stays_off(tmp_path: Path, mode: Mode) -> None:
    save_random("LlamaConfig", {**HEADS, "attention_dropout": 0.5}, tmp_path)
    policy = checkpointed(tmp_path, mode)
    assert not any(module.training for module in policy.model.modules())
    assert torch.equal(
        policy.batch_logps(policy.layout(groups())), policy.batch_logps(policy.layout(groups()))
    )


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_bf16_is_computed_again_in_bf16(tmp_path: Path, mode: Mode) -> None:
    """Selective rounds elsewhere in a norm: that moves a gradient by little of what bf16 does."""
    save_random("LlamaConfig", HEADS, tmp_path)
    found = []
    ways: list[tuple[Mode, torch.dtype]] = [
        ("none", torch.float32),
        ("none", torch.bfloat16),
        (mode, torch.bfloat16),
    ]
    for each, dtype in ways:
        policy = load(tmp_path, dtype=dtype)
        checkpoint_activations(policy.model, each)
        found.append(gradients(policy)[1])
    exact, expected, again = found
    for name, gradient in again.items():
        off = float((expected[name] - exact[name]).norm())
        moved = float((gradient - expected[name]).norm())
        assert moved <= (0.1 * off if mode == "selective" else 0), name


def test_without_gradients_nothing_is_set_up(tmp_path: Path) -> None:
    save_random("LlamaConfig", HEADS, tmp_path)
    policy = checkpointed(tmp_path, "full")
    with torch.no_grad(), kept_by_autograd() as kept:
        policy.batch_logps(policy.layout(groups()))
    assert not kept


def test_weights_are_saved_under_their_own_names(tmp_path: Path) -> None:
    save_random("LlamaConfig", HEADS, tmp_path)
    names = set(load(tmp_path).model.state_dict())
    assert set(checkpointed(tmp_path, "selective").model.state_dict()) == names


def test_a_model_whose_layers_are_unknown_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear does not support activation checkpointing"):
        checkpoint_activations(torch.nn.Linear(2, 2), "full")  # type: ignore[arg-type]
