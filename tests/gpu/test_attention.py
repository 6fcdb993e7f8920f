"""torch's fused kernel on this device: what the packed layout relies on, and that it waits for nothing."""

import numpy as np
import pytest
import torch
from torch import Tensor
from varlen_reference import written_out

from dpo_opt.optimize.forward.packing import Group, VarlenIndex, pack
from dpo_opt.optimize.forward.varlen import takes_varlen, varlen_attention, varlen_kernel
from dpo_opt.schemas.pairs import TokenSequence

pytestmark = pytest.mark.gpu

QUERY_HEADS = 8


def starts(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=device)


def random(shape: tuple[int, ...], *, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def require_close(found: Tensor, expected: Tensor, *, dtype: torch.dtype) -> None:
    """Within a few roundings of the largest value, and without a bias."""
    # A window of one position leaves no gradient for queries and keys.
    error = (found.float() - expected) / expected.abs().max().clamp(min=0.1)
    roundings = torch.finfo(dtype).eps
    assert error.abs().max() < 8 * roundings
    assert error.mean().abs() < roundings / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [None, 1, 5, 64, 1000])
@pytest.mark.parametrize(("key_value_heads", "width"), [(8, 64), (2, 128), (1, 256), (4, 40)])
def test_fewer_queries_than_keys_are_aligned_to_the_last_key(
    cuda: torch.device, key_value_heads: int, width: int, window: int | None, dtype: torch.dtype
) -> None:
    kernel = varlen_kernel()
    # As many keys as queries, more keys, one query, and lengths on both sides of the kernel's blocks.
    queries, keys = [70, 5, 1, 1, 128, 130, 3], [70, 133, 1, 90, 256, 131, 300]
    bounds = (starts(queries, cuda), starts(keys, cuda), max(queries), max(keys))
    left = -1 if window is None else window - 1
    tensors = [
        random((rows, count, width), seed=seed, dtype=dtype, device=cuda).requires_grad_()
        for seed, (rows, count) in enumerate(
            [(sum(queries), QUERY_HEADS), (sum(keys), key_value_heads), (sum(keys), key_value_heads)]
        )
    ]
    found = kernel(*tensors, *bounds, scale=0.1, window_size=(left, 0))
    upstream = random(tuple(found.shape), seed=9, dtype=dtype, device=cuda)
    found_grads = torch.autograd.grad(found, tensors, upstream)

    wide = [t.detach().float().requires_grad_() for t in tensors]
    expected = written_out(*wide, *bounds, scale=0.1, window_size=(left, 0))
    expected_grads = torch.autograd.grad(expected, wide, upstream.float())
    require_close(found, expected, dtype=dtype)
    for mine, exact in zip(found_grads, expected_grads, strict=True):
        require_close(mine, exact, dtype=dtype)


def shared_groups(pairs: int) -> list[Group]:
    rng = np.random.default_rng(0)

    def ids(low: int, high: int) -> np.ndarray:
        return rng.integers(2, 90, size=rng.integers(low, high)).astype(np.int32)

    prompts = [ids(1, 200) for _ in range(pairs)]
    return [(TokenSequence(p, ids(1, 90)), TokenSequence(p, ids(1, 90))) for p in prompts]


@pytest.mark.parametrize("window", [None, 33])
def test_a_pack_waits_for_nothing_and_agrees_with_fp32(cuda: torch.device, window: int | None) -> None:
    batch = pack(shared_groups(12))
    rows = batch.input_ids.shape[1]
    tensors = [
        random((1, heads, rows, 64), seed=seed, dtype=torch.bfloat16, device=cuda).requires_grad_()
        for seed, heads in enumerate((QUERY_HEADS, 2, 2))
    ]
    upstream = random((1, rows, QUERY_HEADS, 64), seed=9, dtype=torch.bfloat16, device=cuda)
    assert takes_varlen(tensors[0], tensors[2])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        index = batch.to(cuda).model_kwargs["varlen"]
        assert isinstance(index, VarlenIndex)
        found = varlen_attention(*tensors, index, scale=None, window=window)
        found_grads = torch.autograd.grad(found, tensors, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    wide = [t.detach().float().requires_grad_() for t in tensors]
    q, k, v = (t[0].transpose(0, 1) for t in wide)
    expected = written_out(
        q,
        k[index.key_rows],
        v[index.key_rows],
        index.query_starts,
        index.key_starts,
        index.longest_query,
        index.longest_key,
        window_size=(-1 if window is None else window - 1, 0),
    )[None]
    expected_grads = torch.autograd.grad(expected, wide, upstream.float())
    require_close(found, expected, dtype=torch.bfloat16)
    for mine, exact in zip(found_grads, expected_grads, strict=True):
        require_close(mine, exact, dtype=torch.bfloat16)


def test_fp32_goes_segment_by_segment(cuda: torch.device) -> None:
    query = torch.zeros(1, 8, 4, 64, device=cuda)
    assert not takes_varlen(query, query)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert takes_varlen(query, query)
