import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_opt.optimize.forward.load_policy import load_policy
from dpo_opt.optimize.forward.packing import Group
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.measure_parity import measure_parity
from dpo_opt.optimize.parity import Parity, require_parity
from dpo_opt.optimize.parity_sample import spread_pairs, spread_positions
from dpo_opt.schemas.errors import FingerprintError
from dpo_opt.schemas.pairs import LogpArray, ScoredPair
from dpo_opt.schemas.shard_folder import ShardFolder


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


MEASURED = Parity(
    pairs=2,
    tokens=30,
    mean=0.5,
    sd=1.5,
    p99=4.0,
    max=5.0,
    floor_sd=0.01,
    floor_p99=0.02,
    floor_max=0.03,
    correlation=0.3,
    margin_mean=0.0,
    margin_sd=2.0,
    floor_margin_sd=0.1,
    loss=0.9,
    worst_row=17,
    worst_side="rejected",
    worst_token=3,
    worst_cached=-9.0,
    worst_own=-4.0,
    dtype="bfloat16",
    cached_dtype="float16",
    ok=False,
)


def test_the_refusal_says_what_was_measured_and_what_to_do() -> None:
    with pytest.raises(FingerprintError) as caught:
        require_parity(MEASURED, shards="DIR", model="MODEL")
    text = str(caught.value)
    for part in (
        "mean +0.5000",
        "sd 1.5000",
        "floor sd 0.0100",
        "30 tokens",
        "dpo-opt precompute --model MODEL",
    ):
        assert part in text
    # What failed is named with its limit and its usual cause; what held is not.
    assert "sd 1.5 > 0.1: noise beyond rounding" in text
    assert "p99 4 > 0.3: " in text
    assert "alone" not in text
    assert "another expert" not in text
    with_experts = refused(MEASURED._replace(experts=True))
    assert "another expert" in str(with_experts)
    assert "--dtype float32; then dpo-opt train --dtype float32" in str(with_experts.fix)
    assert "row 17, rejected, token 3: cached -9.0000, own -4.0000" in text
    assert caught.value.exit_code == 4


def refused(parity: Parity) -> FingerprintError:
    with pytest.raises(FingerprintError) as caught:
        require_parity(parity, shards="DIR", model="MODEL")
    return caught.value


GOOD = MEASURED._replace(mean=0.005, sd=0.05, p99=0.1, max=0.5)
OVER = {"mean": -0.06, "sd": 0.11, "p99": 0.31, "max": 3.1}


@pytest.mark.parametrize("forward", ["", "alone_", "floor_"])
@pytest.mark.parametrize("name", OVER)
def test_each_threshold_fails_alone(name: str, forward: str) -> None:
    assert all(check.ok for check in GOOD.checks)
    for wrong in (OVER[name], math.nan, math.inf):
        parity = GOOD._replace(**{forward + name: wrong})
        failed = [check for check in parity.checks if not check.ok]
        assert [check.name for check in failed] == [f"{forward}{name}".replace("_", " ")]
        assert failed[0].usual_cause in str(refused(parity))


def test_a_floor_beyond_rounding_is_said_to_be_the_models_own() -> None:
    error = refused(GOOD._replace(floor_sd=0.2))
    assert "the log-probs of MODEL depend on the rest of the batch" in str(error)
    assert error.fix is not None
    assert "--dtype float32" in error.fix
    # In fp32 nothing but the order of additions may differ.
    fp32 = GOOD._replace(mean=0, sd=0, p99=0, max=0, floor_p99=0, floor_max=0, dtype="float32")
    assert [c.name for c in fp32._replace(floor_sd=2e-4).checks if not c.ok] == ["floor sd"]
    assert all(c.ok for c in fp32._replace(floor_sd=5e-5).checks)


def test_noise_does_not_raise_its_own_limits() -> None:
    quiet, loud = GOOD, GOOD._replace(sd=9.0, floor_sd=9.0, floor_p99=9.0, floor_max=9.0)
    limits = [{check.name: check.limit for check in parity.checks} for parity in (quiet, loud)]
    for name, limit in limits[0].items():
        # Of the mean's limit, three standard errors at the largest sd that is allowed.
        most = 0.01 + 3 * 0.1 / MEASURED.tokens**0.5 if name.endswith("mean") else limit
        assert limits[1][name] <= most


def test_the_loss_is_judged_in_fp32_only() -> None:
    assert not any(check.name == "loss" for check in MEASURED.checks)
    fp32 = MEASURED._replace(dtype="float32", cached_dtype="float32")
    assert next(check.ok for check in fp32.checks if check.name == "loss") is False
    assert fp32._replace(loss=math.log(2) - 9e-4).checks[-1].ok


def spoiled(shards: Path, row: int, amount: float, *, token: int = 1) -> list[ScoredPair]:
    """One token of one pair's rejected completion is off."""

    def spoil(pair: ScoredPair) -> ScoredPair:
        values = pair.ref_rejected_token_logps.copy()
        values[token] -= amount
        return dataclasses.replace(pair, ref_rejected_token_logps=values)

    return [spoil(pair) if pair.row == row else pair for pair in pairs_of(shards)]


@pytest.mark.parametrize("token", [0, 1, -1])
@pytest.mark.parametrize(("dtype", "amount"), [("float32", 0.02), ("bfloat16", 4.0)])
def test_a_single_bad_token_is_named_by_its_row(
    policy: Policy, shards: Path, dtype: str, amount: float, token: int
) -> None:
    # Many enough that one token is no hundredth of them.
    pairs = 5 * spoiled(shards, -1, 0.0) + spoiled(shards, 11, amount, token=token)
    parity = measure_parity(policy, pairs, cached_dtype=dtype)
    length = next(len(pair.rejected_ids) for pair in pairs if pair.row == 11)
    assert (parity.worst_row, parity.worst_side, parity.worst_token) == (11, "rejected", token % length)
    assert parity.worst_own - parity.worst_cached == pytest.approx(amount, abs=1e-4)
    failed = {check.name for check in parity.checks if not check.ok}
    assert "max" in failed
    assert "p99" not in failed
    assert not parity.ok


def test_a_value_that_is_no_number_is_the_worst(policy: Policy, shards: Path) -> None:
    parity = measure_parity(policy, spoiled(shards, 5, math.nan), cached_dtype="bfloat16")
    assert (parity.worst_row, parity.worst_side, parity.worst_token) == (5, "rejected", 1)
    assert parity.correlation is None
    assert not parity.ok


def test_the_noise_of_margins_is_that_of_sums(policy: Policy, shards: Path) -> None:
    noise = np.random.default_rng(1)
    added: list[LogpArray] = []

    def perturb(values: LogpArray) -> LogpArray:
        added.append(noise.normal(0, 0.02, size=len(values)).astype(np.float32))
        return values + added[-1]

    parity = measure_parity(policy, changed(shards, perturb), cached_dtype="bfloat16")
    margins = [float(c.sum()) - float(r.sum()) for c, r in zip(added[0::2], added[1::2], strict=True)]
    assert parity.margin_mean == pytest.approx(np.mean(margins), abs=1e-4)
    assert parity.margin_sd == pytest.approx(np.std(margins), abs=1e-4)
    assert parity.floor_margin_sd < 1e-4
    cached = np.concatenate([v for p in pairs_of(shards) for v in cached_values(p)])
    expected = np.corrcoef(cached, cached + np.concatenate(added))[0, 1]
    assert parity.correlation == pytest.approx(expected, abs=1e-5)


def cached_values(pair: ScoredPair) -> tuple[LogpArray, LogpArray]:
    return pair.ref_chosen_token_logps, pair.ref_rejected_token_logps


def test_a_lower_precision_than_stated_is_noise_not_a_bad_row(policy: Policy, bf16_shards: Path) -> None:
    parity = measure_parity(policy, pairs_of(bf16_shards), cached_dtype="float32")
    failed = {check.name for check in parity.checks if not check.ok}
    assert {"sd", "p99"} <= failed
    assert measure_parity(policy, pairs_of(bf16_shards), cached_dtype="bfloat16").ok


def test_a_forward_that_disagrees_with_itself_is_refused(
    policy: Policy, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much it disagrees: a wrong mask makes noise as well."""
    exact = Policy.sequence_logps

    def noisy(self: Policy, groups: Sequence[Group]) -> list[torch.Tensor]:
        noise = np.random.default_rng(len(groups))
        found = exact(self, groups)
        return [v + torch.from_numpy(noise.normal(0, 0.2, len(v))).float() for v in found]

    monkeypatch.setattr(Policy, "sequence_logps", noisy)
    parity = measure_parity(policy, pairs_of(shards), cached_dtype="bfloat16")
    assert {"sd", "floor sd", "alone sd"} <= {check.name for check in parity.checks if not check.ok}
    assert "depend on the rest of the batch" in str(refused(parity))


def test_pairs_longer_than_a_batch_have_a_floor_too(
    policy: Policy, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together: list[int] = []
    exact = Policy.sequence_logps

    def count(self: Policy, groups: Sequence[Group]) -> list[torch.Tensor]:
        together.append(len(groups))
        return exact(self, groups)

    monkeypatch.setattr(Policy, "sequence_logps", count)
    monkeypatch.setattr("dpo_opt.optimize.measure_parity._BATCH_ROWS", 1)
    measure_parity(policy, 4 * pairs_of(shards)[:1], cached_dtype="float32")
    # Then each of the eight sequences alone.
    assert together == [2, 2, *[1] * 8]


# Which pairs are compared ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9, 27, 28, 100])
def test_pairs_come_from_every_shard(shards: Path, count: int) -> None:
    folder = ShardFolder.open(shards)
    rows = [pair.row for pair in spread_pairs(folder, count)]
    assert rows == sorted(set(rows))
    assert len(rows) == min(count, 28)
    assert rows == [pair.row for pair in spread_pairs(ShardFolder.open(shards), count)]
    from_shard = [sum(row // 8 == shard for row in rows) for shard in range(4)]
    assert sum(n > 0 for n in from_shard) == min(count, 4)


@pytest.mark.parametrize("sizes", [[1], [5, 1, 1], [1000, 1, 3, 0, 500], [2] * 40, [7, 7, 7]])
def test_shards_give_alike_until_they_have_no_more(sizes: list[int]) -> None:
    shards = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    for count in range(1, sum(sizes) + 2, 1 + sum(sizes) // 50):
        positions = spread_positions(shards, count)
        assert len(positions) == min(count, len(shards))
        assert (np.diff(positions) > 0).all()
        assert ((positions >= 0) & (positions < len(shards))).all()
        taken = np.bincount(shards[positions], minlength=len(sizes))
        most = taken.max()
        for own, size in zip(taken, sizes, strict=True):
            assert own >= min(size, most - 1)


def test_fewer_pairs_may_be_scored_one_by_one(
    policy: Policy, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone: list[int] = []
    exact = Policy.sequence_logps

    def count(self: Policy, groups: Sequence[Group]) -> list[torch.Tensor]:
        if len(groups) == len(groups[0]) == 1:
            alone.append(len(groups[0][0].completion_ids))
        return exact(self, groups)

    monkeypatch.setattr(Policy, "sequence_logps", count)
    parity = measure_parity(policy, pairs_of(shards), cached_dtype="float32", alone=3)
    assert len(alone) == 6
    assert parity.alone_tokens == sum(alone) < parity.tokens
    assert parity.ok
    # The damage in a pair that is compared in batches only is named as ever.
    damaged = measure_parity(policy, spoiled(shards, 11, 0.5), cached_dtype="float32", alone=3)
    assert (damaged.worst_row, damaged.worst_side) == (11, "rejected")
