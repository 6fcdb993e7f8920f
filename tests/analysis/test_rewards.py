import math

import polars as pl
import pytest

from dpo_opt.analysis import rewards

# Worked by hand: chosen -10 against -12 (gained 2), rejected -9 against -8 (lost 1); then a loss on both
# sides, larger for chosen; then a tie; then a run that diverged.
FRAME = pl.DataFrame(
    {
        "chosen_logps": [-10.0, -20.0, -5.0, math.nan],
        "rejected_logps": [-9.0, -11.0, -6.0, -1.0],
        "ref_chosen_logps": [-12.0, -15.0, -4.0, -1.0],
        "ref_rejected_logps": [-8.0, -10.0, -5.0, -2.0],
        "chosen_length": pl.Series([4, 10, 5, 1], dtype=pl.Int32),
        "rejected_length": pl.Series([2, 20, 5, 1], dtype=pl.Int32),
    }
)


def values(expression):
    return FRAME.select(expression.alias("value"))["value"].to_list()


def test_rewards_are_beta_times_logratio():
    assert values(rewards.implicit_reward(0.5))[:3] == [1.0, -2.5, -0.5]
    assert values(rewards.implicit_reward(0.5, side="rejected"))[:3] == [-0.5, -0.5, -0.5]
    assert values(rewards.margin(beta=0.5))[:3] == [1.5, -2.0, 0.0]


def test_a_tie_and_a_diverged_pair_are_not_right():
    assert values(rewards.accuracy()) == [True, False, False, False]


def test_accuracy_is_the_sign_of_the_margin_for_every_beta():
    for beta in (0.01, 0.1, 5.0):
        signs = [m > 0 for m in values(rewards.margin(beta=beta))[:3]]
        assert values(rewards.accuracy())[:3] == signs


def test_ranking_looks_at_one_model_alone():
    assert values(rewards.ranking_accuracy()) == [False, False, True, False]
    assert values(rewards.reference_margin()) == [-4.0, -5.0, 1.0, 1.0]
    assert values(rewards.reference_ranking_accuracy()) == [False, False, True, True]


def test_fallen_completions_are_less_likely_than_under_the_reference():
    assert values(rewards.chosen_fell()) == [False, True, True, False]
    assert values(rewards.rejected_fell()) == [True, True, True, False]


def test_per_token_variants_divide_each_side_by_its_own_length():
    assert values(rewards.chosen_logratio_per_token())[:3] == [0.5, -0.5, -0.2]
    assert values(rewards.rejected_logratio_per_token())[:3] == [-0.5, -0.05, -0.2]


def test_length_difference_is_signed():
    assert values(rewards.length_difference()) == [2, -10, 0, 0]


def test_weight_and_loss_are_those_of_the_margin():
    margins = values(rewards.margin(0.5))[:3]
    assert values(rewards.effective_weight(0.5))[:3] == pytest.approx(
        [1 / (1 + math.exp(m)) for m in margins]
    )
    assert values(rewards.sigmoid_loss(0.5))[:3] == pytest.approx([math.log1p(math.exp(-m)) for m in margins])
    assert values(rewards.sigmoid_loss(1e4))[1] == pytest.approx(40_000)


def test_displaced_is_a_chosen_completion_that_fell_less_than_the_rejected_one():
    frame = pl.DataFrame({"chosen_logps": [-12.0, -12.0, -9.0], "rejected_logps": [-14.0, -11.0, -14.0]})
    frame = frame.with_columns(ref_chosen_logps=pl.lit(-10.0), ref_rejected_logps=pl.lit(-10.0))
    assert frame.select(rewards.displacement()).to_series().to_list() == [True, False, False]


def test_distance_is_the_mean_size_of_both_logratios_per_token():
    assert values(rewards.distance_per_token())[:3] == pytest.approx([0.5, 0.275, 0.2])
