import math
import time

import numpy as np
import pytest

from dpo_opt.analysis.intervals import cluster_starts, ratio_interval, share_interval, wilson


def clustered_pairs(random, prompts=60, shared=1.5):
    """Right or wrong for each pair; pairs of a prompt lean the same way."""
    sizes = random.integers(1, 6, prompts)
    lean = random.normal(0.4, shared, prompts)
    chance = 1 / (1 + np.exp(-np.repeat(lean, sizes)))
    clusters = np.repeat(np.arange(prompts), sizes)
    return clusters, (random.random(len(clusters)) < chance).astype(float)


def sums(clusters, values):
    return np.bincount(clusters, weights=values), np.bincount(clusters).astype(float)


def test_the_interval_is_that_of_resampling_whole_prompts():
    clusters, right = clustered_pairs(np.random.default_rng(0), prompts=400)
    numerators, denominators = sums(clusters, right)
    random = np.random.default_rng(1)
    drawn = random.integers(0, 400, (4000, 400))
    means = numerators[drawn].sum(1) / denominators[drawn].sum(1)
    for kind in (
        ratio_interval(numerators=numerators, denominators=denominators),
        share_interval(successes=numerators, trials=denominators),
    ):
        assert kind.value == pytest.approx(right.mean())
        assert kind.low == pytest.approx(np.quantile(means, 0.025), abs=0.006)
        assert kind.high == pytest.approx(np.quantile(means, 0.975), abs=0.006)


def test_equal_clusters_given_once_with_their_number_give_the_same_interval():
    clusters, right = clustered_pairs(np.random.default_rng(2), prompts=400)
    numerators, denominators = sums(clusters, right)
    (k, n), counts = np.unique(np.stack([numerators, denominators]), axis=1, return_counts=True)
    each = ratio_interval(numerators=numerators, denominators=denominators)
    assert ratio_interval(numerators=k, denominators=n, multiplicities=counts) == pytest.approx(each)
    share = share_interval(successes=numerators, trials=denominators)
    assert share_interval(successes=k, trials=n, multiplicities=counts) == pytest.approx(share)


def test_shared_prompts_widen_the_interval():
    clusters, right = clustered_pairs(np.random.default_rng(3), prompts=200, shared=4.0)
    numerators, denominators = sums(clusters, right)
    by_prompt = ratio_interval(numerators=numerators, denominators=denominators)
    by_pair = ratio_interval(numerators=right, denominators=np.ones(len(right)))
    assert by_prompt.high - by_prompt.low > 1.3 * (by_pair.high - by_pair.low)


def rewards_of_samples(random, prompts):
    """Four samples of each prompt; what a prompt is like counts as much as what a sample is like."""
    values = random.normal(1, 1, (prompts, 1)) + random.normal(0, 1, (prompts, 4))
    return values.sum(1), np.full(prompts, 4.0), 1.0


def skewed_sums_of_samples(random, prompts):
    """Log-ratios summed over a completion: mostly small, some large, alike within a prompt."""
    values = random.gamma(2, 0.5, (prompts, 1)) * random.gamma(3, 1 / 3, (prompts, 4))
    return values.sum(1), np.full(prompts, 4.0), 1.0


def means_over_tokens(random, prompts):
    """Completions of 1 to 60 tokens, whose log-ratios depend on the prompt and on the length."""
    lengths = random.integers(1, 61, (prompts, 4))
    of_prompt = random.normal(0, 0.1, (prompts, 1))
    sums = lengths * (0.2 + of_prompt + 0.002 * lengths) + np.sqrt(lengths) * random.normal(
        0, 0.3, (prompts, 4)
    )
    truth = 0.2 + 0.002 * np.mean(np.arange(1, 61) ** 2) / np.mean(np.arange(1, 61))
    return sums.sum(1), lengths.sum(1).astype(float), truth


def differences_of_runs(random, prompts):
    """Two runs right or wrong on the same pairs: their difference is -1, 0 or 1."""
    _, right, truth = share_of_pairs(random, prompts, lean=0.5)
    _, pairs, _ = share_of_pairs(random, prompts, lean=0.5)
    return right - pairs, np.full(prompts, 5.0), truth - truth


def share_of_pairs(random, prompts, *, lean=0.5):
    """Right answers among five pairs of each prompt, whose chance is the prompt's own."""
    chances = random.beta(4 * lean, 4 * (1 - lean), prompts)
    return np.full(prompts, 5.0), random.binomial(5, chances).astype(float), lean


def coverage(of, random, *, prompts, interval, repeats=2000):
    inside = 0
    for _ in range(repeats):
        numerators, denominators, truth = of(random, prompts)
        found = interval(numerators, denominators)
        inside += found.low <= truth <= found.high
    return inside / repeats


def by_prompt(numerators, denominators):
    return ratio_interval(numerators=numerators, denominators=denominators)


@pytest.mark.parametrize("prompts", [64, 300])
@pytest.mark.parametrize(
    "of", [rewards_of_samples, skewed_sums_of_samples, means_over_tokens, differences_of_runs]
)
def test_95_of_100_intervals_of_a_mean_hold_the_truth(of, prompts):
    assert 0.93 <= coverage(of, np.random.default_rng(4), prompts=prompts, interval=by_prompt) <= 0.97


@pytest.mark.parametrize("prompts", [20, 64, 300])
@pytest.mark.parametrize("lean", [0.5, 0.7, 0.9])
def test_95_of_100_intervals_of_a_share_hold_the_truth(lean, prompts):
    def of(random, prompts):
        trials, successes, truth = share_of_pairs(random, prompts, lean=lean)
        return successes, trials, truth

    def interval(successes, trials):
        return share_interval(successes=successes, trials=trials)

    assert 0.93 <= coverage(of, np.random.default_rng(5), prompts=prompts, interval=interval) <= 0.97


def test_intervals_that_leave_prompts_out_of_account_are_caught():
    def of_pairs(random, prompts):
        values = random.normal(1, 1, (prompts, 1)) + random.normal(0, 1, (prompts, 4))
        return values.ravel(), np.ones(4 * prompts), 1.0

    assert coverage(of_pairs, np.random.default_rng(6), prompts=64, interval=by_prompt, repeats=500) < 0.9

    def wilson_by_prompt(successes, trials):
        return wilson(share=successes.sum() / trials.sum(), trials=len(trials))

    def share(random, prompts):
        trials, successes, truth = share_of_pairs(random, prompts)
        return successes, trials, truth

    assert coverage(share, np.random.default_rng(7), prompts=64, interval=wilson_by_prompt) > 0.97


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706), (2, 4.303), (5, 2.571), (6, 2.447), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_students_t_is_that_of_the_tables(freedom, quantile):
    values = np.random.default_rng(8).normal(0, 1, freedom + 1)
    found = ratio_interval(numerators=values, denominators=np.ones(freedom + 1))
    error = values.std(ddof=1) / math.sqrt(freedom + 1)
    assert (found.high - found.value) / error == pytest.approx(quantile, rel=1e-3)


def test_a_hundred_thousand_prompts_take_seconds():
    values = np.random.default_rng(6).normal(1, 1, 100_000)
    start = time.perf_counter()
    interval = ratio_interval(numerators=values, denominators=np.ones_like(values))
    assert time.perf_counter() - start < 20
    # The mean of 100,000 independent values is normal.
    assert interval.high - interval.low == pytest.approx(2 * 1.96 / math.sqrt(100_000), rel=0.1)


def test_certainty_is_never_claimed_for_all_right_or_all_wrong():
    ones = np.ones(10)
    assert share_interval(successes=ones, trials=ones) == wilson(share=1.0, trials=10)
    low = share_interval(successes=0 * ones, trials=ones)
    assert low.low == 0
    assert low.high == pytest.approx(0.2775, abs=1e-3)


def test_one_prompt_has_a_value_and_no_interval():
    for interval in (
        ratio_interval(numerators=np.array([3.0]), denominators=np.array([4.0])),
        share_interval(successes=np.array([3.0]), trials=np.array([4.0])),
    ):
        assert interval.value == 0.75
        assert math.isnan(interval.low)
        assert math.isnan(interval.high)


def test_prompts_that_all_agree_are_worth_no_more_than_their_pairs():
    halves = share_interval(successes=np.ones(30), trials=np.full(30, 2.0))
    few = wilson(share=0.5, trials=60)
    assert (halves.low, halves.high) == pytest.approx((few.low, few.high), abs=0.01)


def test_nothing_has_no_value():
    assert math.isnan(ratio_interval(numerators=np.array([]), denominators=np.array([])).value)
    assert math.isnan(wilson(share=0.5, trials=0).value)


def test_wilson_matches_published_values():
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    for successes, trials, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
    ]:
        interval = wilson(share=successes / trials, trials=trials)
        assert interval.low == pytest.approx(low, abs=1e-4)
        assert interval.high == pytest.approx(high, abs=1e-4)


def test_clusters_start_where_any_key_changes():
    a, b = np.array([1, 1, 1, 2, 2]), np.array([5, 5, 6, 6, 6])
    assert cluster_starts(a).tolist() == [0, 3]
    assert cluster_starts(a, b).tolist() == [0, 2, 3]
    assert cluster_starts(a[:0]).tolist() == []
