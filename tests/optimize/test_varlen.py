"""The fused kernel's arguments, checked exactly on a CPU by a kernel that is written out here."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen3Config
from varlen_reference import written_out

from dpo_opt.optimize.forward import attention as attention_module
from dpo_opt.optimize.forward import varlen as varlen_module
from dpo_opt.optimize.forward.attention import SEGMENT_ATTENTION, segment_attention
from dpo_opt.optimize.forward.packing import Group, VarlenIndex, pack
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.forward.varlen import choose_kernel, varlen_attention, varlen_kernel
from dpo_opt.schemas.pairs import TokenSequence

QUERY_HEADS, WIDTH = 4, 8


def group(*sequences: Sequence[int], prompt: int) -> Group:
    ids = [np.array(s, dtype=np.int32) for s in sequences]
    return tuple(TokenSequence(s[:prompt], s[prompt:]) for s in ids)


PACKS: dict[str, list[Group]] = {
    f"prefix of {shared}": [group([*range(9)], [*range(shared), *range(20, 27)], prompt=1)]
    for shared in range(1, 9)
} | {
    "one sequence": [group([1, 2, 3, 4, 5], prompt=2)],
    "two that share nothing": [group([1, 2, 3, 4], prompt=2), group([4, 5, 6], prompt=1)],
    "nothing left of the rejected": [group([1, 2, 3, 4, 5], [1, 2, 9], prompt=2), group([7, 8, 9], prompt=2)],
    "nothing left of either": [group([1, 2, 3], [1, 2, 4], prompt=2), group([5, 6, 7], prompt=1)],
    "five that share a prefix": [
        group([3, 3], [3, 4, 4], prompt=1),
        group(*([*range(6), first, *range(first)] for first in range(10, 15)), prompt=4),
        group([1, 2, 3, 4], [1, 2, 5, 6, 7], prompt=2),
    ],
}


def heads(rows: int, key_value_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    counts = (QUERY_HEADS, key_value_heads, key_value_heads)
    return [
        torch.randn(1, count, rows, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
        for count in counts
    ]


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize("key_value_heads", [QUERY_HEADS, 2, 1])
@pytest.mark.parametrize("groups", PACKS.values(), ids=PACKS.keys())
def test_one_call_gives_the_outputs_and_gradients_of_a_call_per_segment(
    monkeypatch: pytest.MonkeyPatch, groups: list[Group], key_value_heads: int, window: int | None
) -> None:
    monkeypatch.setattr(varlen_module, "_KERNEL", written_out)
    batch = pack(groups)
    segments, index = batch.model_kwargs["segments"], batch.model_kwargs["varlen"]
    assert isinstance(index, VarlenIndex)
    inputs = heads(batch.input_ids.shape[1], key_value_heads)
    expected, _ = segment_attention(
        nn.Module(), *inputs, None, segments=segments, scaling=0.3, sliding_window=window
    )
    found = varlen_attention(*inputs, index, scale=0.3, window=window)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)

    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected_grads = torch.autograd.grad(expected, inputs, upstream)
    for mine, theirs in zip(torch.autograd.grad(found, inputs, upstream), expected_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("autocast", [True, False])
def test_a_cpu_in_bf16_computes_attention_in_fp32_and_rounds_once(autocast: bool) -> None:
    batch = pack(next(iter(PACKS.values())))
    segments = batch.model_kwargs["segments"]
    narrow = [x.detach().to(torch.bfloat16) for x in heads(batch.input_ids.shape[1], 2)]
    # Under autocast the rotary embedding leaves fp32 queries and keys; they are not rounded.
    given = [*heads(batch.input_ids.shape[1], 2)[:2], narrow[2]] if autocast else narrow
    given = [x.detach().float() if x.dtype == torch.float64 else x for x in given]
    exact, _ = segment_attention(nn.Module(), *(x.float() for x in given), None, segments=segments)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found, _ = segment_attention(nn.Module(), *given, None, segments=segments)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.to(torch.bfloat16))


def test_without_a_scale_it_is_the_root_of_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen_module, "_KERNEL", written_out)
    batch = pack(PACKS["five that share a prefix"])
    inputs = heads(batch.input_ids.shape[1], 2)
    expected, _ = segment_attention(nn.Module(), *inputs, None, segments=batch.model_kwargs["segments"])
    found = varlen_attention(*inputs, batch.model_kwargs["varlen"], scale=None, window=None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
}


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(LlamaConfig(**SIZES), id="llama"),
        pytest.param(Qwen3Config(**SIZES), id="qwen3"),
        pytest.param(MistralConfig(**SIZES, sliding_window=4), id="mistral-windowed"),
    ],
)
def test_a_model_gives_the_same_log_probs_and_gradients_through_either_kernel(
    monkeypatch: pytest.MonkeyPatch, config: PreTrainedConfig
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float64, attn_implementation=SEGMENT_ATTENTION
    )
    policy = Policy(model.eval(), torch.device("cpu"), torch.float64, packs=True)
    batch = pack([g for groups in PACKS.values() for g in groups])

    def results() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        logps = policy.batch_logps(batch)
        (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
        return logps.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    expected, expected_grads = results()
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs["window_size"])
        return written_out(*args, **kwargs)

    monkeypatch.setattr(varlen_module, "_KERNEL", counted)
    monkeypatch.setattr(attention_module, "takes_varlen", lambda *_: True)
    found, found_grads = results()
    assert calls == [(-1, 0) if config.model_type != "mistral" else (3, 0)] * 3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for name, grad in found_grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=0, atol=1e-5, msg=name)


def test_autocast_decides_the_dtype_that_the_kernel_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def remember(*args: Any, **kwargs: Any) -> Tensor:
        seen.append({x.dtype for x in args[:3]})
        return written_out(*args, **kwargs)

    monkeypatch.setattr(varlen_module, "_KERNEL", remember)
    batch = pack(PACKS["prefix of 3"])
    # As they come out of a model under autocast: the rotary embedding has made fp32 of two of them.
    query, key, value = (x.float() for x in heads(batch.input_ids.shape[1], 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = varlen_attention(
            query, key, value.bfloat16(), batch.model_kwargs["varlen"], scale=None, window=None
        )
    assert seen == [{torch.bfloat16}]
    assert out.dtype == torch.bfloat16


HOPPER = (9, 0)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        pytest.param({}, "varlen", id="bf16 on a GPU"),
        pytest.param({"dtype": torch.float16}, "varlen", id="fp16"),
        pytest.param({"capability": (8, 0)}, "varlen", id="Ampere"),
        pytest.param({"head_dim": 256, "value_dim": 256}, "varlen", id="the widest head"),
        pytest.param({"capability": None}, "sdpa", id="a CPU"),
        pytest.param({"capability": (7, 5)}, "sdpa", id="before Ampere"),
        pytest.param({"dtype": torch.float32}, "sdpa", id="fp32"),
        pytest.param({"head_dim": 264, "value_dim": 264}, "sdpa", id="too wide"),
        pytest.param({"head_dim": 60, "value_dim": 60}, "sdpa", id="no multiple of 8"),
        pytest.param({"head_dim": 192}, "sdpa", id="values of another width"),
    ],
)
def test_the_fused_kernel_is_chosen_where_it_runs(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], expected: str
) -> None:
    monkeypatch.setattr(varlen_module, "_KERNEL", written_out)
    settings: dict[str, Any] = {
        "capability": HOPPER,
        "dtype": torch.bfloat16,
        "head_dim": 128,
        "value_dim": 128,
    }
    assert choose_kernel(**settings | changed) == expected


def torch_2_11(  # type: ignore[no-untyped-def]
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    pass


def torch_2_12(  # type: ignore[no-untyped-def]
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    pass


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        pytest.param(torch_2_11, {}, id="2.11"),
        pytest.param(torch_2_12, {"enable_gqa": True}, id="2.12 to 2.14"),
    ],
)
def test_each_torch_is_called_the_way_it_wants(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., None], expected: dict[str, Any]
) -> None:
    monkeypatch.setattr(varlen_module, "varlen_attn", function)
    found = varlen_kernel()
    added = found.keywords if isinstance(found, functools.partial) else {}
    assert added == expected
    assert inspect.signature(found).bind(*range(7), scale=1.0, window_size=(-1, 0))
