import dataclasses

import pytest
import torch
from torch import Tensor

from dpo_opt.optimize.forward import logps as logps_module
from dpo_opt.optimize.forward.logps import Head, token_logps

SCORED, WIDTH, VOCABULARY = 37, 24, 101


@dataclasses.dataclass
class Case:
    """A head on random states, and upstream gradients of both signs."""

    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(SCORED, WIDTH, generator=generator)
        weight = torch.randn(VOCABULARY, WIDTH, generator=generator) * 0.7
        bias = torch.randn(VOCABULARY, generator=generator) if self.bias else None
        targets = torch.randint(0, VOCABULARY, (SCORED,), generator=generator)
        upstream = torch.randn(SCORED, generator=generator)
        return hidden, weight, bias, targets, upstream


def textbook(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, case: Case) -> Tensor:
    """All logits at once, in the dtype of the inputs."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * case.scale
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def blocks_of(monkeypatch: pytest.MonkeyPatch, rows: int, *, keep: int = 1000) -> None:
    """Project so many rows at a time, and keep the derivatives of so many at most."""
    sizes = logps_module._Bytes(
        block=4 * VOCABULARY * rows, part=4 * VOCABULARY * max(1, rows - 1), kept=4 * VOCABULARY * keep
    )
    monkeypatch.setattr(logps_module, "_ON_CPU", sizes)


@pytest.mark.parametrize(
    ("rows", "keep"), [(1, 1000), (5, 1000), (1000, 1000), (5, SCORED), (5, 12), (5, 0), (1, SCORED - 1)]
)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(), id="plain"),
        pytest.param(Case(bias=True), id="bias"),
        pytest.param(Case(scale=0.25), id="scale"),
        pytest.param(Case(softcap=3.0), id="softcap"),
        pytest.param(Case(bias=True, scale=1.7, softcap=4.0), id="all"),
    ],
)
def test_values_and_gradients_are_those_of_full_logits_in_float64(
    monkeypatch: pytest.MonkeyPatch, case: Case, rows: int, keep: int
) -> None:
    blocks_of(monkeypatch, rows, keep=keep)
    hidden, weight, bias, targets, upstream = case.tensors()
    inputs = [t.requires_grad_() for t in (hidden, weight, bias) if t is not None]
    found = token_logps(hidden, Head(weight, bias, case.scale, case.softcap), targets)
    found_grads = torch.autograd.grad(found, inputs, upstream)

    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected = textbook(wide[0], wide[1], wide[2] if bias is not None else None, targets, case)
    expected_grads = torch.autograd.grad(expected, wide, upstream.double())

    assert found.dtype == torch.float32
    assert expected.std() > 0.5
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)
    for mine, exact in zip(found_grads, expected_grads, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=2e-5)


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[1.0], [1.0]])
    weight = torch.tensor([[3e4], [0.0], [-3e4]])
    found = token_logps(hidden, Head(weight, None, 1.0, None), torch.tensor([0, 2]))
    assert found.tolist() == [0.0, -6e4]


def test_tokens_that_a_bias_forbids_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks_of(monkeypatch, 5)
    hidden, weight, _, targets, _ = Case().tensors()
    forbidden = torch.zeros(VOCABULARY + 30).index_fill_(
        0, torch.arange(VOCABULARY, VOCABULARY + 30), -torch.inf
    )
    padded = torch.cat([weight, weight[:30]])
    found = token_logps(hidden, Head(padded, forbidden, 1.0, None), targets)
    torch.testing.assert_close(found, token_logps(hidden, Head(weight, None, 1.0, None), targets))


def test_half_precision_states_lose_nothing_in_the_head() -> None:
    hidden, weight, _, targets, _ = Case().tensors()
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    found = token_logps(hidden, Head(weight, None, 1.0, None), targets)
    exact = textbook(hidden.double(), weight.double(), None, targets, Case())
    rounded = textbook(hidden, weight, None, targets, Case()).double()
    assert (found.double() - exact).abs().max() < 2e-5
    assert (rounded - exact).abs().max() > 0.01, "the same in bf16 would have been as good"


def test_half_precision_gradients_are_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks_of(monkeypatch, 1, keep=0)  # 37 additions
    hidden, weight, _, targets, upstream = Case().tensors()
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    found = token_logps(hidden, Head(weight, None, 1.0, None), targets)
    grads = torch.autograd.grad(found, [hidden, weight], upstream)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    exact = torch.autograd.grad(textbook(*wide, None, targets, Case()), wide, upstream.double())
    for mine, expected in zip(grads, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        # bf16 keeps 8 bits: half a unit in the last place is 2^-9.
        torch.testing.assert_close(mine.double(), expected, rtol=2**-8, atol=1e-4)


def test_a_tied_weight_collects_both_gradients() -> None:
    _, embedding, _, targets, upstream = Case().tensors()
    ids = torch.arange(SCORED) % 7

    def grad(weight: Tensor, *, mine: bool) -> Tensor:
        hidden = weight[ids].tanh()
        values = (
            token_logps(hidden, Head(weight, None, 1.0, None), targets)
            if mine
            else textbook(hidden, weight, None, targets, Case())
        )
        (found,) = torch.autograd.grad(values, weight, upstream.to(weight.dtype))
        return found.double()

    tied = grad(embedding.clone().requires_grad_(), mine=True)
    expected = grad(embedding.double().requires_grad_(), mine=False)
    torch.testing.assert_close(tied, expected, rtol=1e-5, atol=2e-5)


def test_a_frozen_weight_gets_no_gradient() -> None:
    hidden, weight, bias, targets, upstream = Case(bias=True).tensors()
    hidden.requires_grad_()
    found = token_logps(hidden, Head(weight, bias, 1.0, None), targets)
    found.backward(upstream)
    assert weight.grad is None
    assert bias is not None
    assert bias.grad is None
    assert hidden.grad is not None
    assert hidden.grad.abs().max() > 0


def test_log_probs_of_the_whole_vocabulary_sum_to_one() -> None:
    hidden, weight, _, _, _ = Case().tensors()
    every = token_logps(
        hidden[:1].expand(VOCABULARY, -1), Head(weight, None, 1.0, None), torch.arange(VOCABULARY)
    )
    assert float(every.double().exp().sum()) == pytest.approx(1.0, abs=1e-6)


def test_what_backward_needs_is_kept_only_where_backward_can_come() -> None:
    hidden, weight, _, targets, _ = Case().tensors()
    head = Head(weight.requires_grad_(), None, 1.0, None)
    with torch.no_grad():
        found = token_logps(hidden, head, targets)
    assert not found.requires_grad
    assert torch.equal(found, token_logps(hidden, head, targets))

    def kept(weight: Tensor, hidden: Tensor) -> list[int]:
        made = token_logps(hidden, Head(weight, None, 1.0, None), targets).grad_fn
        assert made is not None
        return [t.numel() for t in made.saved_tensors if t is not None]  # type: ignore[attr-defined]

    derivatives = SCORED * VOCABULARY
    assert derivatives in kept(weight, hidden)
    # A frozen head, as in LoRA.
    assert max(kept(weight.detach(), hidden.requires_grad_())) == VOCABULARY * WIDTH


@pytest.mark.parametrize("target", [VOCABULARY, VOCABULARY + 7, -1])
def test_a_token_that_the_head_does_not_have_is_refused(target: int) -> None:
    hidden, weight, _, targets, _ = Case().tensors()
    targets[5] = target
    with pytest.raises(RuntimeError, match=f"not among the head's {VOCABULARY}"):
        token_logps(hidden.requires_grad_(), Head(weight, None, 1.0, None), targets)
