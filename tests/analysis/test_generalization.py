from collections import namedtuple

import polars as pl
import pytest

from dpo_opt.analysis.generalization import overfitting
from dpo_opt.analysis.intervals import Interval

Result = namedtuple("Result", "reward_accuracy")


def evals(*losses):
    return pl.DataFrame({"step": [10 * (i + 1) for i in range(len(losses))], "eval_loss": losses})


def splits(training, held_out):
    return {"training": Result(Interval(training, training, training)), "held-out": Result(held_out)}


def test_training_pairs_above_the_held_out_interval_are_overfitting():
    found = overfitting(splits(1.0, Interval(0.5, 0.3, 0.7)), evals(0.6, 0.6))
    assert found.training_accuracy == 1.0
    assert found.lowest is None


@pytest.mark.parametrize("held_out", [Interval(0.5, 0.3, 0.7), Interval(0.5, float("nan"), float("nan"))])
def test_within_the_interval_or_without_one_nothing_is_said(held_out):
    assert overfitting(splits(0.69, held_out), evals(0.6, 0.59)) is None


def test_a_held_out_loss_that_rises_by_a_tenth_is_overfitting():
    found = overfitting({}, evals(0.69, 0.5, 0.52, 0.56))
    assert found.lowest == (20, 0.5)
    assert overfitting({}, evals(0.69, 0.5, 0.52, 0.54)) is None


def test_nothing_known_is_nothing_said():
    assert overfitting({}, pl.DataFrame(schema={"step": pl.Int64})) is None
