import dataclasses
import itertools
from typing import NamedTuple

import numpy as np
import polars as pl
import pytest

from dpo_opt.analysis.kl import estimate_kl
from dpo_opt.analysis.load import scan_kl_samples
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.kl_samples import KLSample, write_kl_samples

STATES, STEPS = 6, 12


class Chain(NamedTuple):
    """A Markov chain that stands in for a language model: its KL to another chain is known exactly."""

    start: np.ndarray
    step: np.ndarray

    @classmethod
    def random(cls, random, scale):
        logits = random.normal(0, 1, (STATES + 1, STATES)) * scale
        table = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        return cls(table[0], table[1:])

    def mixed(self, other, share):
        return Chain(*((1 - share) * a + share * b for a, b in zip(self, other, strict=True)))


def exact_kl(policy, reference):
    """Sum over steps of the expected next-token KL, with the state's distribution carried along exactly."""
    total = float(policy.start @ np.log(policy.start / reference.start))
    state = policy.start
    for _ in range(STEPS - 1):
        total += float(state @ (policy.step * np.log(policy.step / reference.step)).sum(1))
        state = state @ policy.step
    return total


def write_chain_samples(path, policy, reference, *, prompts, per_prompt):
    random = np.random.default_rng(7)
    count = prompts * per_prompt

    def draw(chances):
        return (random.random((count, 1)) > chances.cumsum(1)).sum(1).clip(max=STATES - 1)

    columns = [draw(np.tile(policy.start, (count, 1)))]
    for _ in range(STEPS - 1):
        columns.append(draw(policy.step[columns[-1]]))
    policy_logps, ref_logps = (
        np.log([m.start[columns[0]], *(m.step[a, b] for a, b in itertools.pairwise(columns))]).T
        for m in (policy, reference)
    )
    samples = [
        KLSample(
            prompt_id=f"{i // per_prompt:032x}",
            sample=i % per_prompt,
            finished=i % per_prompt != 0,
            prompt_ids=np.array([1], dtype=np.int32),
            completion_ids=np.array([c[i] for c in columns], dtype=np.int32),
            policy_token_logps=policy_logps[i].astype(np.float32),
            ref_token_logps=ref_logps[i].astype(np.float32),
        )
        for i in range(count)
    ]
    write_kl_samples(path, samples)
    return samples


@pytest.fixture(scope="module")
def chains():
    random = np.random.default_rng(0)
    reference = Chain.random(random, 1.0)
    return reference.mixed(Chain.random(random, 1.0), 0.35), reference


@pytest.fixture(scope="module")
def table(tmp_path_factory, chains):
    path = tmp_path_factory.mktemp("kl") / "final.parquet"
    return path, write_chain_samples(path, *chains, prompts=1000, per_prompt=4)


def test_all_three_estimates_find_the_exact_kl_of_a_chain(table, chains):
    exact = exact_kl(*chains)
    assert exact > 0.3
    estimate = estimate_kl(scan_kl_samples(table[0]))
    for found, truth in [
        (estimate.k1_sequence, exact),
        (estimate.k1_token, exact / STEPS),
        (estimate.k3_token, exact / STEPS),
    ]:
        # Half an interval is about two standard errors; the seed is fixed, so three are never exceeded.
        assert abs(found.value - truth) < 0.75 * (found.high - found.low)
        assert found.value == pytest.approx(truth, rel=0.05)
        assert found.high - found.low < 0.15 * truth


def test_k3_is_less_noisy_than_k1_while_the_models_are_close(table):
    estimate = estimate_kl(scan_kl_samples(table[0]))
    assert estimate.k3_token.high - estimate.k3_token.low < estimate.k1_token.high - estimate.k1_token.low


def test_estimates_are_the_sums_taken_token_by_token(table):
    estimate = estimate_kl(scan_kl_samples(table[0]))
    r = [s.policy_token_logps.astype(np.float64) - s.ref_token_logps.astype(np.float64) for s in table[1]]
    flat = np.concatenate(r)
    assert estimate.k1_sequence.value == pytest.approx(np.mean([x.sum() for x in r]))
    assert estimate.k1_token.value == pytest.approx(flat.mean())
    assert estimate.k3_token.value == pytest.approx(np.mean(np.exp(-flat) - 1 + flat))


def test_counts_say_what_was_sampled(table):
    estimate = estimate_kl(scan_kl_samples(table[0]))
    assert (estimate.samples, estimate.prompts, estimate.tokens) == (4000, 1000, 4000 * STEPS)
    assert estimate.unfinished.value == 0.25


def test_a_policy_equal_to_its_reference_has_no_kl(tmp_path, chains):
    _, reference = chains
    write_chain_samples(tmp_path / "same.parquet", reference, reference, prompts=5, per_prompt=2)
    estimate = estimate_kl(scan_kl_samples(tmp_path / "same.parquet"))
    assert estimate.k1_sequence == (0, 0, 0)
    assert estimate.k3_token == (0, 0, 0)


def test_lists_of_different_lengths_are_refused_by_prompt_and_sample(tmp_path, table):
    sample = table[1][5]
    short = dataclasses.replace(sample, ref_token_logps=sample.ref_token_logps[:-1])
    write_kl_samples(tmp_path / "bad.parquet", [table[1][0], short])
    with pytest.raises(DataError, match=f"sample 1 of prompt {sample.prompt_id}"):
        estimate_kl(scan_kl_samples(tmp_path / "bad.parquet"))


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("finished", pl.lit(None, dtype=pl.Boolean), "no value in the columns finished"),
        ("ref_token_logps", pl.lit(None, dtype=pl.List(pl.Float32)), "a sample has no ref_token_logps"),
        ("policy_token_logps", pl.lit("x"), r"policy_token_logps holds String, not List\(Float32\)"),
    ],
)
def test_a_table_whose_column_has_no_values_or_others_is_refused(tmp_path, table, column, value, says):
    file = tmp_path / "samples.parquet"
    pl.read_parquet(table[0]).with_columns(value.alias(column)).write_parquet(file)
    with pytest.raises(DataError, match=says):
        estimate_kl(scan_kl_samples(file), where=str(file))


def test_an_empty_table_is_refused(tmp_path):
    write_kl_samples(tmp_path / "empty.parquet", [])
    with pytest.raises(DataError, match="empty"):
        estimate_kl(scan_kl_samples(tmp_path / "empty.parquet"))
