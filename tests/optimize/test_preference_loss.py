import math

import pytest
import torch

from dpo_opt.optimize import preference_loss
from dpo_opt.optimize.losses.pair_inputs import LossInputs
from dpo_opt.optimize.losses.preference_loss import PreferenceLoss


def inputs(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    *,
    reference: tuple[float, float] = (-10.0, -12.0),
    beta: float = 0.1,
) -> LossInputs:
    """Pairs of 5 and 6 tokens, against one reference."""
    return LossInputs(
        chosen_logps=chosen,
        rejected_logps=rejected,
        ref_chosen_logps=torch.full_like(chosen, reference[0]),
        ref_rejected_logps=torch.full_like(rejected, reference[1]),
        chosen_lengths=torch.full_like(chosen, 5, dtype=torch.int64),
        rejected_lengths=torch.full_like(rejected, 6, dtype=torch.int64),
        beta=beta,
    )


def loss(
    chosen: list[float], rejected: list[float], *, label_smoothing: float = 0.0, beta: float = 0.1
) -> PreferenceLoss:
    """Against a reference of -10 and -12."""
    sides = (torch.tensor(side, dtype=torch.float64) for side in (chosen, rejected))
    return preference_loss("sigmoid", inputs(*sides, beta=beta), label_smoothing=label_smoothing)


def test_values_worked_by_hand() -> None:
    found = loss([-8.0, -10.0], [-15.0, -7.0])
    # Log-ratios: 2 and -3, 0 and 5; beta 0.1; margins 0.5 and -0.5.
    assert found.chosen_rewards.tolist() == pytest.approx([0.2, 0.0])
    assert found.rejected_rewards.tolist() == pytest.approx([-0.3, 0.5])
    # -ln(1 / (1 + e^-0.5)) and -ln(1 / (1 + e^0.5))
    assert found.losses.tolist() == pytest.approx([0.4740769842, 0.9740769842], abs=1e-9)


def test_smoothed_labels_mix_both_directions() -> None:
    found = loss([-8.0], [-15.0], label_smoothing=0.2)
    assert found.losses.tolist() == pytest.approx([0.8 * 0.4740769842 + 0.2 * 0.9740769842], abs=1e-9)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.4])
def test_loss_is_ln_2_where_policy_equals_reference(label_smoothing: float) -> None:
    found = loss([-10.0], [-12.0], label_smoothing=label_smoothing)
    assert found.losses.item() == pytest.approx(math.log(2), abs=1e-15)
    assert found.chosen_rewards.item() == found.rejected_rewards.item() == 0.0


def test_descent_raises_chosen_and_lowers_rejected() -> None:
    chosen = torch.tensor([-10.0], requires_grad=True)
    rejected = torch.tensor([-12.0], requires_grad=True)
    found = preference_loss("sigmoid", inputs(chosen, rejected, beta=0.3))
    found.losses.sum().backward()
    # d loss / d chosen = -beta x sigmoid(-margin), and the margin is 0.
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.15)
    assert rejected.grad.item() == pytest.approx(0.15)


def test_smoothed_loss_has_its_minimum_where_the_labels_have_their_odds() -> None:
    # cDPO: with a share e of swapped labels the best margin is ln((1 - e) / e).
    best = math.log(0.9 / 0.1)
    margins = [best - 0.01, best, best + 0.01]
    values = [loss([-10.0 + 10 * m], [-12.0], label_smoothing=0.1).losses.item() for m in margins]
    assert values[1] < values[0]
    assert values[1] < values[2]


def test_rewards_carry_no_gradient() -> None:
    chosen = torch.tensor([-8.0], requires_grad=True)
    found = preference_loss("sigmoid", inputs(chosen, torch.tensor([-10.0]), reference=(-10.0, -10.0)))
    assert not found.chosen_rewards.requires_grad
    assert not found.rejected_rewards.requires_grad
    assert found.losses.requires_grad


def test_huge_margins_stay_finite() -> None:
    found = loss([-1e5, 1e5], [1e5, -1e5], beta=1.0)
    assert found.losses.tolist() == pytest.approx([200_002, 0.0], abs=1e-9)
