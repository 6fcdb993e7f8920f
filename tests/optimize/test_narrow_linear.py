"""Weights rounded at every use: the numbers of autocast, without its copy of the model."""

import copy

import pytest
import torch
from torch import Tensor, nn

from dpo_opt.optimize.forward.gradient_place import give_place
from dpo_opt.optimize.forward.load_policy import load_policy
from dpo_opt.optimize.forward.narrow_linear import round_weights_at_use
from dpo_opt.schemas.pairs import TokenSequence


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 40, bias=False), nn.Linear(40, 8))


def trained(
    model: nn.Module, hidden: Tensor
) -> tuple[Tensor, list[Tensor], list[tuple[torch.Size, torch.dtype]]]:
    """Output, gradients of input and parameters, and what the graph kept for the backward."""
    kept: list[tuple[torch.Size, torch.dtype]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append((tensor.shape, tensor.dtype))
        return tensor

    hidden = hidden.clone().requires_grad_()
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False),
    ):
        output = model(hidden)
    output.float().square().sum().backward()
    return output, [t.grad for t in (hidden, *model.parameters())], kept


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (1, 1, 24)])
@pytest.mark.parametrize("frozen", [False, True])
def test_outputs_and_gradients_are_those_of_autocast_bit_by_bit(shape: tuple[int, ...], frozen: bool) -> None:
    plain = small()
    plain[0].requires_grad_(not frozen)
    narrow = copy.deepcopy(plain)
    round_weights_at_use(narrow, torch.bfloat16)
    hidden = torch.randn(shape)
    expected, found = trained(plain, hidden), trained(copy.deepcopy(narrow), hidden)
    assert torch.equal(found[0], expected[0])
    for own, other in zip(found[1], expected[1], strict=True):
        assert (own is None and other is None) or torch.equal(own, other)


def test_no_rounded_copy_of_a_weight_is_kept() -> None:
    def copies(model: nn.Module) -> int:
        sizes = {frozenset(layer.weight.shape) for layer in model if isinstance(layer, nn.Linear)}
        kept = trained(model, torch.randn(3, 24))[2]
        return sum(dtype == torch.bfloat16 and frozenset(shape) in sizes for shape, dtype in kept)

    model = small()
    assert copies(model) == 3
    round_weights_at_use(model, torch.bfloat16)
    assert copies(model) == 0


def test_gradients_of_several_backwards_are_summed_in_their_place() -> None:
    plain = small()
    placed = copy.deepcopy(plain)
    round_weights_at_use(placed, torch.bfloat16)
    places = []
    for parameter in placed.parameters():
        # What lies there before is nothing's gradient.
        places.append(torch.full_like(parameter, torch.nan))
        give_place(parameter, places[-1])
    for _ in range(3):
        hidden = torch.randn(7, 24)
        trained(plain, hidden)
        trained(placed, hidden)
    for own, other, place in zip(placed.parameters(), plain.parameters(), places, strict=True):
        assert torch.equal(own.grad, other.grad)
        assert own.grad is place or own.ndim == 1  # biases have no product


def test_without_autocast_a_layer_computes_as_it_is_stored() -> None:
    model = small()
    expected = model(torch.ones(2, 24))
    round_weights_at_use(model, torch.bfloat16)
    assert torch.equal(model(torch.ones(2, 24)), expected)


def test_a_policy_that_trains_in_half_precision_keeps_no_rounded_weights(tiny_model) -> None:
    policy = load_policy(tiny_model, dtype=torch.bfloat16, device=torch.device("cpu"), trainable=True)
    weights = {p.shape for n, p in policy.model.named_parameters() if "proj" in n}
    kept: list[tuple[torch.Size, torch.dtype]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append((tensor.shape, tensor.dtype))
        return tensor

    ids = torch.arange(10, 60).numpy()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        (logps,) = policy.sequence_logps([(TokenSequence(ids[:20], ids[20:]),)])
    logps.sum().backward()
    rounded = [shape for shape, dtype in kept if dtype == torch.bfloat16]
    assert not [shape for shape in rounded if shape in weights or torch.Size(reversed(shape)) in weights]
