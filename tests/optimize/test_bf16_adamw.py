import math
import struct
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dpo_opt.optimize.update import bf16_adamw
from dpo_opt.optimize.update.bf16_adamw import RoundedAdamW, mixed, round_stochastically

BF16 = torch.bfloat16
# Bounds below are this many standard deviations; the bits are fixed, so a test that passes keeps passing.
SIGMAS = 4


def rounded(values: Tensor, *, seed: int = 0, step: int = 1, parameter: int = 0) -> Tensor:
    return round_stochastically(values, seed=seed, step=step, parameter=parameter)


def neighbours(exact: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 numbers on both sides, in float64, found by stepping and not by bits."""
    nearest = exact.to(BF16)
    up = torch.nextafter(nearest, torch.tensor(math.inf, dtype=BF16))
    down = torch.nextafter(nearest, torch.tensor(-math.inf, dtype=BF16))
    above = nearest.double() > exact
    below = nearest.double() < exact
    return torch.where(above, down, nearest).double(), torch.where(below, up, nearest).double()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("share", [2**-16, 0.125, 0.5, 0.875, 1 - 2**-16])
def test_numbers_are_rounded_away_from_zero_as_often_as_their_cut_off_part_is_large(
    share: float, sign: int
) -> None:
    count = 1 << 18
    values = torch.full((count,), sign * (1.5 + share * 2**-7))
    found = rounded(values)
    low, high = sign * 1.5, sign * (1.5 + 2**-7)
    assert bool(((found == low) | (found == high)).all())
    away = int((found == high).sum())
    assert abs(away - share * count) <= SIGMAS * math.sqrt(count * share * (1 - share)) + 1


def test_the_mean_over_seeds_is_the_value_where_the_nearest_is_off() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, generator=generator) * torch.logspace(-30, 30, 400)
    low, high = neighbours(values.double())
    unit = (high - low).clamp(min=torch.finfo(torch.float64).tiny)
    seeds = 1000
    mean = torch.stack([rounded(values, seed=seed).double() for seed in range(seeds)]).mean(0)
    error = (mean - values.double()) / unit
    share = (values.double() - low) / unit
    deviation = (share * (1 - share) / seeds).sqrt()
    assert bool((error.abs() <= 5 * deviation + 1e-12).all())
    assert ((values.to(BF16).double() - values.double()) / unit).abs().mean() > 0.2


def test_what_bfloat16_can_hold_is_left_as_it_is() -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(BF16)
    found = rounded(every.float())
    nan = every.isnan()
    assert int(nan.sum()) == 2 * 127
    assert torch.equal(found[~nan].view(torch.int16), every[~nan].view(torch.int16))
    assert bool(found[nan].isnan().all())


def test_a_nan_of_any_bits_stays_one() -> None:
    # The last is CUDA's own. Taken as numbers, two of them would overflow, and one be cut to an infinity.
    patterns = (0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF)
    values = torch.frombuffer(bytearray(struct.pack("<5I", *patterns)), dtype=torch.float32)
    for seed in range(20):
        assert bool(rounded(values, seed=seed).isnan().all())


def lowbias32_noise(index: int, seed: int, step: int, parameter: int) -> int:
    """The upper half of the hash of an element, in whole numbers."""
    first, second = divmod(mixed(seed, step, parameter), 1 << 32)[::-1]
    x = (index + first) % (1 << 32)
    x = (x ^ (x >> 16)) * 0x7FEB352D % (1 << 32)
    x = (x + second) % (1 << 32)
    x = (x ^ (x >> 15)) * 0x846CA68B % (1 << 32)
    return (x ^ (x >> 16)) & 0xFFFF


def test_bits_are_the_published_hash_of_the_element() -> None:
    generator = torch.Generator().manual_seed(3)
    cut_off = torch.randint(0, 1 << 16, (1003,), generator=generator, dtype=torch.int32)
    values = ((torch.tensor(0x3F80, dtype=torch.int32) << 16) + cut_off).view(torch.float32)
    found = rounded(values, seed=7, step=11, parameter=13)
    expected = [int(cut) + lowbias32_noise(i, 7, 11, 13) >= 1 << 16 for i, cut in enumerate(cut_off.tolist())]
    assert (found > 1).tolist() == expected
    assert 300 < sum(expected) < 700


@pytest.mark.parametrize("other", [{"seed": 1}, {"step": 2}, {"parameter": 1}])
def test_seed_step_and_parameter_decide_and_nothing_else(other: dict[str, int]) -> None:
    count = 1 << 16
    half = torch.full((count,), 1 + 2**-8)
    first = rounded(half)
    torch.rand(3)
    assert torch.equal(rounded(half), first)
    # Like coins thrown twice.
    same = int((rounded(half, **other) == first).sum())
    assert abs(same - count / 2) < SIGMAS * math.sqrt(count) / 2


@pytest.mark.parametrize("distance", [1, 2, 64, 1 << 15])
def test_elements_are_rounded_independently_of_each_other(distance: int) -> None:
    up = rounded(torch.full((1 << 16,), 1 + 2**-8)) > 1
    same = int((up[distance:] == up[:-distance]).sum())
    count = len(up) - distance
    assert abs(same - count / 2) < SIGMAS * math.sqrt(count) / 2


def test_the_size_of_the_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(50, 41, generator=torch.Generator().manual_seed(0))
    whole = rounded(values)
    monkeypatch.setattr(bf16_adamw, "_BLOCK", 100)
    assert torch.equal(rounded(values), whole)


def gradients(shape: tuple[int, ...], step: int, *, size: float = 1e-3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step)) * size


def make(parameters: list[nn.Parameter], **changed: float) -> RoundedAdamW:
    settings = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.0, **changed}
    return RoundedAdamW(parameters, betas=(0.9, 0.99), seed=5, **settings)


@pytest.mark.parametrize("gradient_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_each_number_is_the_exact_one_rounded_up_or_down_and_right_in_the_mean(
    weight_decay: float, gradient_dtype: torch.dtype
) -> None:
    shape = (40, 100)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(9)) * 0.02
    weight = nn.Parameter(start.to(BF16))
    weight.grad_dtype = gradient_dtype
    optimizer = make([weight], weight_decay=weight_decay)
    stored = [weight.detach().double(), torch.zeros(shape).double(), torch.zeros(shape).double()]
    for step in range(1, 6):
        weight.grad = gradients(shape, step).to(gradient_dtype)
        gradient = weight.grad.double()
        optimizer.step()
        # The textbook's update of what was stored, in float64.
        first = 0.9 * stored[1] + 0.1 * gradient
        second = 0.99 * stored[2] + 0.01 * gradient**2
        corrected = (first / (1 - 0.9**step), second / (1 - 0.99**step))
        value = stored[0] * (1 - 1e-3 * weight_decay) - 1e-3 * corrected[0] / (corrected[1].sqrt() + 1e-8)
        state = optimizer.state[weight]
        stored = [tensor.detach().double() for tensor in (weight, state["exp_avg"], state["exp_avg_sq"])]
        for found, exact in zip(stored, (value, first, second), strict=True):
            # What nearly cancels has a smaller unit than its terms, and their fp32 rounding would show.
            size = exact.abs().clamp(min=exact.abs().median() / 100)
            error = (found - exact) / torch.exp2(size.log2().floor() - 7)
            assert error.abs().max() < 1.01
            assert abs(float(error.mean())) < SIGMAS * 0.5 / math.sqrt(found.numel())
            assert error.abs().mean() > 0.25
    assert {tensor.dtype for name, tensor in state.items() if name != "step"} == {BF16}


def drift(optimizer: torch.optim.Optimizer, weight: nn.Parameter, steps: int) -> float:
    before = weight.detach().double().mean()
    for _ in range(steps):
        weight.grad = torch.full_like(weight, -1e-3)
        optimizer.step()
    return float(weight.detach().double().mean() - before)


def test_updates_survive_in_the_mean_that_the_nearest_number_swallows() -> None:
    """Weights of 0.02 have neighbours 1.2e-4 away; each of 100 AdamW steps is 1e-6."""

    def weights(dtype: torch.dtype) -> nn.Parameter:
        return nn.Parameter(torch.full((20_000,), 0.02).to(dtype))

    full, nearest, random = weights(torch.float32), weights(BF16), weights(BF16)
    exact = drift(torch.optim.AdamW([full], lr=1e-6, weight_decay=0, fused=True), full, 100)
    swallowed = drift(torch.optim.AdamW([nearest], lr=1e-6, weight_decay=0, fused=True), nearest, 100)
    survived = drift(make([random], lr=1e-6), random, 100)
    assert exact == pytest.approx(1e-4, rel=1e-3)
    assert swallowed == 0.0
    deviation = math.sqrt(100 * 1e-6 * 2**-13 / 20_000)
    assert abs(survived - exact) < SIGMAS * deviation  # 3% of the way
    assert deviation < 0.01 * exact


def test_the_second_moment_falls_where_the_nearest_number_would_stay() -> None:
    def after(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> float:
        for step in range(300):
            weight.grad = torch.full_like(weight, 1.0 if step == 0 else 0.0)
            optimizer.step()
        return float(optimizer.state[weight]["exp_avg_sq"].double().mean())

    nearest, random = (nn.Parameter(torch.zeros(2000, dtype=BF16)) for _ in range(2))
    stuck = after(torch.optim.AdamW([nearest], lr=1e-6, betas=(0.9, 0.999), fused=True), nearest)
    falls = after(
        RoundedAdamW([random], lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, seed=0), random
    )
    assert stuck == pytest.approx(1e-3, rel=0.01)
    assert falls == pytest.approx(1e-3 * 0.999**299, rel=0.01)


def test_parameters_in_float32_are_not_rounded() -> None:
    mine, theirs = (nn.Parameter(torch.linspace(-1, 1, 30).view(5, 6)) for _ in range(2))
    optimizer = make([mine, nn.Parameter(torch.zeros(2, dtype=BF16))], weight_decay=0.1)
    stock = torch.optim.AdamW([theirs], lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    for step in range(3):
        mine.grad = theirs.grad = gradients((5, 6), step)
        optimizer.step()
        stock.step()
    assert torch.equal(mine, theirs)


def test_parameters_that_are_not_stored_row_by_row_are_updated_too() -> None:
    """A gradient may come transposed."""
    results = []
    for gradient in (gradients((6, 5), 1), gradients((6, 5), 1).t().contiguous().t()):
        weight = nn.Parameter(torch.zeros(6, 5, dtype=BF16))
        weight.grad = gradient.to(BF16)
        make([weight]).step()
        results.append(weight.detach())
    assert torch.equal(*results)
    assert bool((results[0] != 0).all())


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_a_spread_parameter_is_updated_like_a_whole_one(dtype: torch.dtype) -> None:
    mesh = init_device_mesh("cpu", (1,))
    start = gradients((8, 6), 0).to(dtype)
    whole = nn.Parameter(start.clone())
    spread = nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(0)]))
    optimizers = make([whole]), make([spread])
    for step in (1, 2):
        whole.grad = gradients((8, 6), step).to(dtype)
        spread.grad = distribute_tensor(whole.grad, mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(spread.full_tensor(), whole)
    assert not torch.equal(whole, start)
