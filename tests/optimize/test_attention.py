import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import PACKED, groups, load, save_random
from torch import Tensor, nn

from dpo_opt.optimize.forward.attention import segment_attention
from dpo_opt.optimize.forward.packing import Segment
from dpo_opt.optimize.forward.policy import one_by_one

ROWS, QUERY_HEADS, WIDTH = 17, 4, 8
# A prefix of 6 rows and two sequences that go on from it, then another sequence alone.
SEGMENTS = (Segment(0, 9, 0, 0), Segment(9, 13, 0, 6), Segment(13, 17, 13, 13))


def heads(key_value_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, n, ROWS, WIDTH) for n in (QUERY_HEADS, key_value_heads, key_value_heads)]
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


def visible(row: int, window: int | None) -> list[int]:
    """Rows that a row sees, nearest last: by hand from the segments."""
    (segment,) = [s for s in SEGMENTS if s.start <= row < s.stop]
    seen = [*range(segment.prefix_start, segment.prefix_stop), *range(segment.start, row + 1)]
    return seen if window is None else seen[-window:]


def row_by_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """(1, T, H, D) in float64, one softmax at a time."""
    repeat = query.shape[1] // key.shape[1]
    out = torch.zeros(1, ROWS, QUERY_HEADS, WIDTH, dtype=torch.float64)
    for row in range(ROWS):
        seen = visible(row, window)
        for head in range(QUERY_HEADS):
            q = query[0, head, row].double()
            k, v = key[0, head // repeat, seen].double(), value[0, head // repeat, seen].double()
            scores = k @ q * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            shares = scores.exp()
            rest = 0.0 if sinks is None else sinks[head].double().exp()
            out[0, row, head] = shares / (shares.sum() + rest) @ v
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize("key_value_heads", [QUERY_HEADS, 2, 1])
def test_each_row_sees_its_prefix_and_its_own_past(key_value_heads: int, window: int | None) -> None:
    query, key, value = heads(key_value_heads)
    found, weights = segment_attention(
        nn.Module(), query, key, value, None, segments=SEGMENTS, scaling=0.3, sliding_window=window
    )
    assert weights is None
    expected = row_by_row(query, key, value, scale=0.3, window=window)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_the_window_matters_in_the_test_above() -> None:
    query, key, value = heads(2)
    wide, narrow = (row_by_row(query, key, value, scale=0.3, window=w) for w in (None, 8))
    assert (wide - narrow).abs().max() > 0.01


def test_the_rejected_part_does_not_see_the_chosen_part() -> None:
    query, key, value = heads(2)
    before, _ = segment_attention(nn.Module(), query, key, value, None, segments=SEGMENTS)
    key[:, :, 6:9] += 1
    after, _ = segment_attention(nn.Module(), query, key, value, None, segments=SEGMENTS)
    changed = (before != after).flatten(2).any(-1)[0].numpy()
    assert np.flatnonzero(changed).tolist() == [6, 7, 8]


@pytest.mark.parametrize("window", [None, 1, 8])
@pytest.mark.parametrize("key_value_heads", [QUERY_HEADS, 2])
@pytest.mark.parametrize(("softcap", "sinks"), [(0.7, False), (None, True), (0.7, True)])
def test_soft_capped_scores_and_sinks_are_written_out(
    softcap: float | None, sinks: bool, key_value_heads: int, window: int | None
) -> None:
    given = [x.requires_grad_() for x in heads(key_value_heads)]
    extra = torch.linspace(-2, 1, QUERY_HEADS).requires_grad_() if sinks else None
    found, _ = segment_attention(
        nn.Module(), *given, None, segments=SEGMENTS, scaling=0.9, sliding_window=window, softcap=softcap,
        s_aux=extra,
    )  # fmt: skip
    expected = row_by_row(*given, scale=0.9, window=window, softcap=softcap, sinks=extra)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    inputs = [*given, *([extra] if extra is not None else [])]
    own = torch.autograd.grad(found.square().sum(), inputs)
    for gradient, right in zip(own, torch.autograd.grad(expected.square().sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-5)
    plain = row_by_row(*given, scale=0.9, window=window)
    assert window == 1 or (plain - expected).abs().max() > 0.01, "neither shows in these numbers"


@pytest.mark.parametrize("name", ["gemma2-softcapped", "gpt-oss-sinks"])
def test_one_sequence_at_a_time_is_computed_with_them_too(tmp_path: Path, name: str) -> None:
    save_random(*PACKED[name], tmp_path)
    policy = load(tmp_path)
    assert policy.packs
    packed = policy.sequence_logps(groups())
    with one_by_one(policy) as alone:
        for found, sequence in zip(packed, itertools.chain(*groups()), strict=True):
            torch.testing.assert_close(alone(sequence), found, rtol=0, atol=1e-4)


def test_no_scores_are_kept_for_the_backward() -> None:
    query, key, value = (x.requires_grad_() for x in heads(2))
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        segment_attention(nn.Module(), query, key, value, None, segments=SEGMENTS, softcap=0.7)
    longest = max(s.stop - s.start for s in SEGMENTS)
    # A mask has no heads: nothing as large as the scores of all heads is kept.
    assert max(kept) < QUERY_HEADS * longest * longest


@pytest.mark.parametrize("unknown", ["attention_mask", "attention_bias"])
def test_what_the_kernel_would_ignore_is_refused(unknown: str) -> None:
    query, key, value = heads(2)
    settings: dict[str, object] = {"attention_mask": None, unknown: torch.ones(1)}
    with pytest.raises(
        NotImplementedError, match="has no masks" if "mask" in unknown else f"has no {unknown}"
    ):
        segment_attention(nn.Module(), query, key, value, segments=SEGMENTS, **settings)  # type: ignore[arg-type]


class _Layer(nn.Module):
    def __init__(self, **config: object) -> None:
        super().__init__()
        self.config = type("Config", (), config)
        self.layer_idx = 1


@pytest.mark.parametrize(
    ("layer", "refused"),
    [
        pytest.param(_Layer(sliding_window=8), True, id="a window for all layers"),
        pytest.param(_Layer(sliding_window=None), False, id="no window"),
        pytest.param(
            _Layer(sliding_window=8, layer_types=["full_attention", "sliding_attention"]), True, id="this one"
        ),
        pytest.param(
            _Layer(sliding_window=8, layer_types=["sliding_attention", "full_attention"]), False, id="another"
        ),
    ],
)
def test_a_window_that_the_layer_keeps_to_itself_is_refused(layer: nn.Module, refused: bool) -> None:
    query, key, value = heads(2)
    if refused:
        with pytest.raises(NotImplementedError, match="sliding window"):
            segment_attention(layer, query, key, value, None, segments=SEGMENTS)
    else:
        segment_attention(layer, query, key, value, None, segments=SEGMENTS)
