"""The gradient of a weight that is embedding and head: in bf16 rounded once, in fp32 held once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import HEADS, load, save_random
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_opt.optimize.forward.architecture import head_of
from dpo_opt.optimize.forward.logps import token_logps
from dpo_opt.optimize.forward.packing import Group
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.forward.tied_gradients import TiedRows, sum_tied_gradients, tied_rows
from dpo_opt.schemas.pairs import TokenSequence

SIZES = {**HEADS, "tie_word_embeddings": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SIZES),
    # Its embedding scales what it looks up.
    "gemma3": ("Gemma3TextConfig", {**SIZES, "sliding_window": 16}),
}


def repetitive() -> list[Group]:
    """Two sequences of few different tokens: hundreds of rows are added to each one's gradient."""
    rng = np.random.default_rng(0)
    prompt, *sides = (rng.integers(3, 9, size=size, dtype=np.int32) for size in (90, 200, 150))
    return [tuple(TokenSequence(prompt, side) for side in sides)]


def errors(policy: Policy) -> Tensor:
    """(V, d) how far the weight's gradient is from that in float64 of the same products, in bf16 roundings.

    Those are of the states that the head reads, and of the gradients that the embedding gets.
    """
    embedding: Any = policy.model.get_input_embeddings()
    weight, head, batch = embedding.weight, head_of(policy.model), policy.layout(repetitive())
    upstream: list[Tensor] = []
    hook = embedding.register_forward_hook(
        lambda _, __, output: output.register_hook(upstream.append) and None
    )
    states = policy.batch_states(batch)
    hook.remove()
    logps = token_logps(states, head, batch.targets, dtype=policy.dtype, tied=tied_rows(policy.model))
    # Chosen up, rejected down: most of what the head's rows get cancels.
    factors = torch.where(torch.arange(len(logps)) < batch.lengths[0], -1.0, 1.0)
    torch.autograd.backward(logps, factors)

    wide = weight.detach().double().requires_grad_()
    logits = states.detach().double() @ wide.T * head.scale
    found = logits.log_softmax(-1).gather(1, batch.targets[:, None]).squeeze(1)
    (exact,) = torch.autograd.grad(found, wide, factors.double())
    towards = upstream[0] * getattr(embedding, "embed_scale", torch.ones(1)).to(weight.dtype)
    exact.index_add_(0, batch.input_ids.flatten(), towards.flatten(0, 1).double())
    # Half a unit in the last place of bf16's 8 bits; sums in fp32 are not exact either.
    return (weight.grad.double() - exact).abs() / (2**-8 * exact.abs() + 1e-5 * exact.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_a_tied_gradient_is_rounded_once(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random(*MODELS[name], tmp_path)
    # Only the sums round: the head's products are those of a CPU without bf16.
    monkeypatch.setattr("dpo_opt.optimize.forward.head_products._multiplies_bf16", lambda: False)
    bf16 = {"dtype": torch.bfloat16, "param_dtype": torch.bfloat16}
    assert errors(load(tmp_path, **bf16)).max() <= 1.0
    monkeypatch.setattr("dpo_opt.optimize.forward.load_policy.sum_tied_gradients", lambda _: None)
    assert errors(load(tmp_path, **bf16)).max() > 5.0, "autograd's own sum would have been as good"


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_and_other_gradients_stay_the_same(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_random(*MODELS[name], tmp_path)

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        policy = load(tmp_path, dtype=torch.bfloat16, param_dtype=torch.bfloat16)
        logps = policy.batch_logps(policy.layout(repetitive()))
        torch.autograd.backward(logps.sum())
        return logps, {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}

    logps, gradients = run()
    monkeypatch.setattr("dpo_opt.optimize.forward.load_policy.sum_tied_gradients", lambda _: None)
    expected, others = run()
    assert torch.equal(logps, expected)
    assert gradients.keys() == others.keys()
    different = [n for n, gradient in gradients.items() if not torch.equal(gradient, others[n])]
    assert [n.rpartition(".")[0].rpartition(".")[2] for n in different] == ["embed_tokens"]


class Large(TorchDispatchMode):
    """Counts what is allocated as large as a weight."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self._shape = like.shape
        self._seen: dict[int, StorageWeakRef] = {}
        self.most = 0

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.shape == self._shape:
            self._seen[result.untyped_storage()._cdata] = StorageWeakRef(result.untyped_storage())  # type: ignore[no-untyped-call]
        self.most = max(self.most, sum(not held.expired() for held in self._seen.values()))  # type: ignore[no-untyped-call]
        return result


@pytest.mark.parametrize("name", MODELS)
def test_an_fp32_gradient_is_held_once(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random(*MODELS[name], tmp_path)

    def run() -> tuple[Tensor, int]:
        """The gradient of two micro-batches, and how many as large there were at once in the second."""
        policy = load(tmp_path)
        weight = policy.model.get_input_embeddings().weight
        held = 0
        for _ in range(2):
            logps = policy.batch_logps(policy.layout(repetitive()))
            with Large(weight) as large:
                torch.autograd.backward(logps.sum())
            held = large.most
        assert isinstance(weight.grad, Tensor)
        return weight.grad, held

    gradient, held = run()
    monkeypatch.setattr("dpo_opt.optimize.forward.load_policy.sum_tied_gradients", lambda _: None)
    expected, before = run()
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    # The sum of the micro-batches itself, and what the second one adds to it.
    assert held == 2
    assert before > 2, "autograd held no more"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_gradient_comes_from_padding_and_none_is_lost_without_a_head(dtype: torch.dtype) -> None:
    weight = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain, tied = (torch.nn.Embedding(9, 4, padding_idx=0, dtype=dtype) for _ in range(2))
    head = torch.nn.Linear(4, 9, bias=False)
    for embedding in (plain, tied):
        embedding.weight = torch.nn.Parameter(weight.clone())
    head.weight = tied.weight
    model: Any = type(
        "Model", (), {"get_input_embeddings": lambda _: tied, "get_output_embeddings": lambda _: head}
    )()
    sum_tied_gradients(model)
    ids = torch.tensor([[3, 0, 5], [3, 3, 0]])
    for embedding in (plain, tied):
        torch.autograd.backward((embedding(ids) * 2).sum())
    assert plain.weight.grad is not None
    assert tied.weight.grad is not None
    assert torch.equal(plain.weight.grad, tied.weight.grad)
    assert isinstance(tied_rows(model), TiedRows)


def test_a_model_whose_head_is_its_own_is_left_as_it_is(tmp_path: Path) -> None:
    save_random("LlamaConfig", HEADS, tmp_path)
    policy = load(tmp_path, dtype=torch.bfloat16, param_dtype=torch.bfloat16)
    assert type(policy.model.get_input_embeddings()) is torch.nn.Embedding
    assert tied_rows(policy.model) is None
