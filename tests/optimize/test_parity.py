import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_opt.optimize.parity import Parity, measure_parity, require_parity
from dpo_opt.optimize.policy import Policy, load_policy
from dpo_opt.schemas.errors import FingerprintError
from dpo_opt.schemas.manifest import ShardFolder
from dpo_opt.schemas.pairs import LogpArray, ScoredPair


def pairs_of(shards: Path) -> list[ScoredPair]:
    return list(ShardFolder.open(shards).pairs())


def changed(shards: Path, change: Callable[[LogpArray], LogpArray]) -> list[ScoredPair]:
    """The pairs with other cached log-probs."""
    return [
        dataclasses.replace(
            pair,
            ref_chosen_token_logps=change(pair.ref_chosen_token_logps),
            ref_rejected_token_logps=change(pair.ref_rejected_token_logps),
        )
        for pair in pairs_of(shards)
    ]


def cpu_policy(folder: Path, dtype: torch.dtype = torch.float32) -> Policy:
    return load_policy(folder, dtype=dtype, device=torch.device("cpu"), trainable=True)


def test_a_model_agrees_with_its_own_cache(policy: Policy, shards: Path) -> None:
    parity = measure_parity(policy, pairs_of(shards), cached_dtype="float32")
    assert parity.ok
    assert parity.max < 1e-5
    assert parity.loss == pytest.approx(math.log(2), abs=1e-6)
    assert parity.pairs == 28
    assert parity.tokens == sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs_of(shards)) > 500
    require_parity(parity, shards="shards", model="model")


def test_the_figures_are_those_of_the_difference(policy: Policy, shards: Path) -> None:
    noise = np.random.default_rng(0)
    added: list[LogpArray] = []

    def perturb(values: LogpArray) -> LogpArray:
        added.append(noise.normal(0.004, 0.03, size=len(values)).astype(np.float32))
        return values + added[-1]

    parity = measure_parity(policy, changed(shards, perturb), cached_dtype="bfloat16")
    expected = np.concatenate(added).astype(np.float64)
    assert parity.mean == pytest.approx(expected.mean(), abs=1e-5)
    assert parity.sd == pytest.approx(expected.std(), abs=1e-5)
    assert parity.max == pytest.approx(np.abs(expected).max(), abs=1e-5)
    assert parity.p99 == pytest.approx(np.quantile(np.abs(expected), 0.99), abs=1e-5)
    assert parity.floor_sd < 1e-5


def test_scored_in_bf16_and_trained_in_fp32_agrees_within_rounding(policy: Policy, bf16_shards: Path) -> None:
    parity = measure_parity(policy, pairs_of(bf16_shards), cached_dtype="bfloat16")
    assert parity.ok
    assert parity.sd > 1e-3, "the two precisions gave the same numbers, so nothing was tested"


def test_trained_in_bf16_agrees_with_both(tiny_model: Path, shards: Path, bf16_shards: Path) -> None:
    policy = cpu_policy(tiny_model, torch.bfloat16)
    for folder, dtype in ((shards, "float32"), (bf16_shards, "bfloat16")):
        assert measure_parity(policy, pairs_of(folder), cached_dtype=dtype).ok


def test_half_precision_is_not_held_to_fp32_and_fp32_is(policy: Policy, bf16_shards: Path) -> None:
    assert not measure_parity(policy, pairs_of(bf16_shards), cached_dtype="float32").ok


def test_a_few_noisy_tokens_are_no_evidence_of_a_bias(policy: Policy, shards: Path) -> None:
    noise = np.random.default_rng(4)
    few = changed(shards, lambda v: (v + noise.normal(0.015, 0.08, size=len(v))).astype(np.float32))[:2]
    parity = measure_parity(policy, few, cached_dtype="bfloat16")
    assert abs(parity.mean) > 0.01
    assert parity.ok


def shifted(values: LogpArray) -> LogpArray:
    return np.roll(values, 1)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(shifted, id="one token late"),
        pytest.param(lambda v: v + np.float32(0.05), id="a constant bias"),
        pytest.param(lambda v: v - np.float32(0.05), id="a constant bias downwards"),
        pytest.param(lambda v: np.where(np.arange(len(v)) == 0, np.nan, v).astype(np.float32), id="NaN"),
        pytest.param(
            lambda v: np.where(np.arange(len(v)) == 0, -np.inf, v).astype(np.float32), id="infinity"
        ),
        pytest.param(lambda v: v * np.float32(0.5), id="another temperature"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")  # the spread of infinities
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_that_are_not_the_models_are_refused(
    policy: Policy, shards: Path, change: Callable[[LogpArray], LogpArray], dtype: str
) -> None:
    parity = measure_parity(policy, changed(shards, change), cached_dtype=dtype)
    assert not parity.ok
    with pytest.raises(FingerprintError, match="the cached log-probs are not those of model"):
        require_parity(parity, shards="shards", model="model")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_model_is_refused(other_model: Path, shards: Path, dtype: str) -> None:
    parity = measure_parity(cpu_policy(other_model), pairs_of(shards), cached_dtype=dtype)
    assert not parity.ok
    assert parity.sd > 0.1


def test_an_error_on_both_sides_leaves_the_margins_and_is_refused(policy: Policy, shards: Path) -> None:
    equal = [
        dataclasses.replace(
            pair,
            ref_chosen_token_logps=pair.ref_chosen_token_logps - np.float32(1.0 / len(pair.chosen_ids)),
            ref_rejected_token_logps=pair.ref_rejected_token_logps - np.float32(1.0 / len(pair.rejected_ids)),
        )
        for pair in pairs_of(shards)
    ]
    parity = measure_parity(policy, equal, cached_dtype="bfloat16")
    assert parity.loss == pytest.approx(math.log(2), abs=1e-4), "the loss alone would not have seen it"
    assert not parity.ok


def test_the_refusal_says_what_was_measured_and_what_to_do() -> None:
    parity = Parity(
        pairs=2,
        tokens=30,
        mean=0.5,
        sd=1.5,
        p99=4.0,
        max=5.0,
        floor_sd=0.01,
        floor_p99=0.02,
        loss=0.9,
        ok=False,
    )
    with pytest.raises(FingerprintError) as caught:
        require_parity(parity, shards="DIR", model="MODEL")
    text = str(caught.value)
    for part in ("mean +0.5000", "sd 1.5000", "floor sd 0.0100", "30 tokens", "dpo-opt verify --shards DIR"):
        assert part in text
    assert caught.value.exit_code == 4
