import math
import time

import numpy as np
import pytest

from dpo_opt.analysis.intervals import bootstrap_ratio, bootstrap_share, cluster_starts, wilson


def clustered_pairs(random, prompts=60, shared=1.5):
    """Right or wrong for each pair; pairs of a prompt lean the same way."""
    sizes = random.integers(1, 6, prompts)
    lean = random.normal(0.4, shared, prompts)
    chance = 1 / (1 + np.exp(-np.repeat(lean, sizes)))
    clusters = np.repeat(np.arange(prompts), sizes)
    return clusters, (random.random(len(clusters)) < chance).astype(float)


def sums(clusters, values):
    return np.bincount(clusters, weights=values), np.bincount(clusters).astype(float)


def test_bootstrap_matches_resampling_whole_prompts_pair_by_pair():
    clusters, right = clustered_pairs(np.random.default_rng(0))
    numerators, denominators = sums(clusters, right)
    interval = bootstrap_ratio(numerators=numerators, denominators=denominators)
    random = np.random.default_rng(1)
    groups = [right[clusters == c] for c in np.unique(clusters)]
    means = [
        np.concatenate([groups[i] for i in random.integers(0, len(groups), len(groups))]).mean()
        for _ in range(3000)
    ]
    assert interval.value == pytest.approx(right.mean())
    assert interval.low == pytest.approx(np.quantile(means, 0.025), abs=0.015)
    assert interval.high == pytest.approx(np.quantile(means, 0.975), abs=0.015)


def test_equal_clusters_given_once_with_their_number_give_the_same_interval():
    clusters, right = clustered_pairs(np.random.default_rng(2), prompts=400)
    numerators, denominators = sums(clusters, right)
    each = bootstrap_ratio(numerators=numerators, denominators=denominators)
    (k, n), counts = np.unique(np.stack([numerators, denominators]), axis=1, return_counts=True)
    together = bootstrap_ratio(numerators=k, denominators=n, multiplicities=counts)
    assert together.value == pytest.approx(each.value)
    assert together.low == pytest.approx(each.low, abs=0.006)
    assert together.high == pytest.approx(each.high, abs=0.006)


def test_shared_prompts_widen_the_interval():
    clusters, right = clustered_pairs(np.random.default_rng(3), prompts=200, shared=4.0)
    numerators, denominators = sums(clusters, right)
    by_prompt = bootstrap_ratio(numerators=numerators, denominators=denominators)
    by_pair = bootstrap_ratio(numerators=right, denominators=np.ones(len(right)))
    assert by_prompt.high - by_prompt.low > 1.3 * (by_pair.high - by_pair.low)


def test_nineteen_of_twenty_intervals_hold_the_truth():
    random = np.random.default_rng(4)
    truth = clustered_pairs(random, prompts=100_000)[1].mean()
    found = [sums(*clustered_pairs(random, prompts=80)) for _ in range(150)]
    inside = [i.low <= truth <= i.high for i in (bootstrap_share(successes=k, trials=n) for k, n in found)]
    assert 0.89 <= np.mean(inside) <= 0.99


def test_the_same_pairs_always_give_the_same_interval():
    numerators, denominators = sums(*clustered_pairs(np.random.default_rng(5)))
    first = bootstrap_ratio(numerators=numerators, denominators=denominators)
    assert first == bootstrap_ratio(numerators=numerators, denominators=denominators)


def test_a_hundred_thousand_prompts_take_seconds():
    values = np.random.default_rng(6).normal(1, 1, 100_000)
    start = time.perf_counter()
    interval = bootstrap_ratio(numerators=values, denominators=np.ones_like(values))
    assert time.perf_counter() - start < 20
    # The mean of 100,000 independent values is normal.
    assert interval.high - interval.low == pytest.approx(2 * 1.96 / math.sqrt(100_000), rel=0.1)


def test_certainty_is_never_claimed_for_all_right_or_all_wrong():
    ones = np.ones(10)
    assert bootstrap_share(successes=ones, trials=ones) == wilson(share=1.0, trials=10)
    low = bootstrap_share(successes=0 * ones, trials=ones)
    assert low.low == 0
    assert low.high == pytest.approx(0.2775, abs=1e-3)


def test_one_prompt_has_a_value_and_no_interval():
    interval = bootstrap_ratio(numerators=np.array([3.0]), denominators=np.array([4.0]))
    assert interval.value == 0.75
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_nothing_has_no_value():
    assert math.isnan(bootstrap_ratio(numerators=np.array([]), denominators=np.array([])).value)
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
