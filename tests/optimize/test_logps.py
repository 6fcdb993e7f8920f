import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_opt.optimize.forward import logit_tiles as tiles_module
from dpo_opt.optimize.forward import logps as logps_module
from dpo_opt.optimize.forward.logps import Head, Objective, token_logps

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


def tiles_of(monkeypatch: pytest.MonkeyPatch, *, rows: int, columns: int) -> None:
    monkeypatch.setattr(tiles_module, "_TILE_ROWS", rows)
    for device in ("_ON_CPU", "_ON_GPU"):
        sizes = getattr(tiles_module, device)._replace(entries=rows * columns)
        monkeypatch.setattr(tiles_module, device, sizes)


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (1, VOCABULARY), (5, 7), (SCORED, 1), (SCORED, VOCABULARY), (1000, 1000)]
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
    monkeypatch: pytest.MonkeyPatch, case: Case, rows: int, columns: int
) -> None:
    tiles_of(monkeypatch, rows=rows, columns=columns)
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
    tiles_of(monkeypatch, rows=5, columns=10)
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
    tiles_of(monkeypatch, rows=1, columns=VOCABULARY)  # 37 additions
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


LENGTHS = (5, 1, 9, 12, 3, 7)


def sigmoid_objective(targets: Tensor) -> Objective:
    """A loss of each pair, of both signs, that depends on its log-probs in a curved way."""
    references = torch.linspace(-40, 0, len(LENGTHS))
    starts = torch.tensor((0, *LENGTHS)).cumsum(0)
    signs = torch.where(targets % 2 == 0, 0.5, -0.3)

    def value(logps: Tensor, pairs: slice) -> Tensor:
        first = int(starts[pairs.start])
        terms = []
        for pair in range(pairs.start, pairs.stop):
            begin, end = int(starts[pair]) - first, int(starts[pair + 1]) - first
            sums = (signs[int(starts[pair]) : int(starts[pair + 1])] * logps[begin:end]).sum()
            terms.append(torch.nn.functional.softplus(0.2 * (sums - references[pair])))
        return torch.stack(terms).sum()

    return Objective(LENGTHS, value)


@pytest.mark.parametrize("rows", [1, 9, 14, SCORED, 1000])
@pytest.mark.parametrize(
    "case", [pytest.param(Case(), id="plain"), pytest.param(Case(True, 1.7, 4.0), id="all")]
)
def test_gradients_taken_while_projecting_are_those_taken_afterwards(
    monkeypatch: pytest.MonkeyPatch, case: Case, rows: int
) -> None:
    sizes = tiles_module._ON_CPU._replace(wide_entries=rows * VOCABULARY, wide_rows=4)
    monkeypatch.setattr(tiles_module, "_ON_CPU", sizes)
    tiles_of(monkeypatch, rows=5, columns=30)
    hidden, weight, bias, targets, _ = case.tensors()
    inputs = [t.requires_grad_() for t in (hidden, weight, bias) if t is not None]
    head = Head(weight, bias, case.scale, case.softcap)
    objective = sigmoid_objective(targets)
    every = slice(0, len(LENGTHS))

    afterwards = token_logps(hidden, head, targets)
    expected = torch.autograd.grad(objective.value(afterwards, every), inputs)
    at_once = token_logps(hidden, head, targets, objective=objective)
    found = torch.autograd.grad(objective.value(at_once, every), inputs)

    torch.testing.assert_close(at_once, afterwards, rtol=0, atol=1e-5)
    for mine, exact in zip(found, expected, strict=True):
        assert exact.abs().max() > 0.05
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-5)


def test_gradients_are_taken_from_one_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    projected: list[int] = []
    project = logps_module._logits

    def counting(at: Any, columns: slice, out: Tensor | None = None) -> Tensor:
        tile = project(at, columns, out)
        projected.append(tile.numel())
        return tile

    monkeypatch.setattr(logps_module, "_logits", counting)
    hidden, weight, _, targets, _ = Case().tensors()
    weight.requires_grad_()
    objective = sigmoid_objective(targets)
    for promise, times in ((None, 2), (objective, 1)):
        projected.clear()
        logps = token_logps(hidden, Head(weight, None, 1.0, None), targets, objective=promise)
        objective.value(logps, slice(0, len(LENGTHS))).backward()
        assert sum(projected) == times * SCORED * VOCABULARY


def test_a_loss_that_was_not_promised_is_refused() -> None:
    hidden, weight, _, targets, _ = Case().tensors()
    weight.requires_grad_()
    objective = sigmoid_objective(targets)
    logps = token_logps(hidden, Head(weight, None, 1.0, None), targets, objective=objective)
    with pytest.raises(RuntimeError, match="not the promised objective"):
        (2 * objective.value(logps, slice(0, len(LENGTHS)))).backward()


def test_without_gradients_the_objective_is_not_asked() -> None:
    def never(_: Tensor, __: slice) -> Tensor:
        raise AssertionError

    hidden, weight, _, targets, _ = Case().tensors()
    expected = token_logps(hidden, Head(weight, None, 1.0, None), targets)
    objective = Objective(LENGTHS, never)
    assert torch.equal(
        token_logps(hidden, Head(weight, None, 1.0, None), targets, objective=objective), expected
    )
    weight.requires_grad_()
    with torch.no_grad():
        assert torch.equal(
            token_logps(hidden, Head(weight, None, 1.0, None), targets, objective=objective), expected
        )


def test_in_place_the_weights_gradient_is_added_to_what_is_there() -> None:
    hidden, weight, _, targets, _ = Case().tensors()
    every = slice(0, len(LENGTHS))

    def grads(*, in_place: bool, times: int) -> tuple[Tensor, Tensor]:
        states, own = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        objective = dataclasses.replace(sigmoid_objective(targets), in_place=in_place)
        for _ in range(times):
            # Tied: the weight is used before the head, too.
            fed = states + own[: len(states)] * 0.1
            logps = token_logps(fed, Head(own, None, 1.0, None), targets, objective=objective)
            objective.value(logps, every).backward()
        assert states.grad is not None
        assert own.grad is not None
        return states.grad, own.grad

    for times in (1, 3):
        for mine, exact in zip(
            grads(in_place=True, times=times), grads(in_place=False, times=times), strict=True
        ):
            assert exact.abs().max() > 0.05
            torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-5)


def test_in_place_leaves_a_frozen_weight_alone() -> None:
    hidden, weight, _, targets, _ = Case().tensors()
    hidden.requires_grad_()
    objective = dataclasses.replace(sigmoid_objective(targets), in_place=True)
    logps = token_logps(hidden, Head(weight, None, 1.0, None), targets, objective=objective)
    objective.value(logps, slice(0, len(LENGTHS))).backward()
    assert weight.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize("target", [VOCABULARY, VOCABULARY + 7, -1])
@pytest.mark.parametrize("promised", [True, False])
def test_a_token_that_the_head_does_not_have_is_refused(target: int, promised: bool) -> None:
    hidden, weight, _, targets, _ = Case().tensors()
    targets[5] = target
    objective = Objective([SCORED], lambda logps, _: logps.sum()) if promised else None
    with pytest.raises(RuntimeError, match=f"not among the head's {VOCABULARY}"):
        token_logps(hidden.requires_grad_(), Head(weight, None, 1.0, None), targets, objective=objective)


def test_memory_that_nothing_was_written_to_is_no_log_prob() -> None:
    hidden, weight, _, targets, _ = Case().tensors()
    targets[5] = VOCABULARY
    found, _ = logps_module._project(logps_module._Operands(hidden, Head(weight, None, 1.0, None), targets))
    assert found.isnan().nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("lengths", [[SCORED - 1], [SCORED, 1]])
def test_an_objective_about_other_tokens_is_refused(lengths: list[int]) -> None:
    hidden, weight, _, targets, _ = Case().tensors()
    objective = Objective(lengths, lambda logps, _: logps.sum())
    with pytest.raises(ValueError, match=f"not {SCORED}"):
        token_logps(hidden.requires_grad_(), Head(weight, None, 1.0, None), targets, objective=objective)
