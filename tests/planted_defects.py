"""Defects of a forward, a cache or a kernel, planted one at a time, each to be noticed before training.

A defect changes the code or the data while its context is open; model and shards on disk stay as they are.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_opt.optimize.forward import attention, packing, policy
from dpo_opt.optimize.forward.architecture import decoder_of
from dpo_opt.optimize.forward.attention import SEGMENT_ATTENTION
from dpo_opt.optimize.forward.layout import choose_layout
from dpo_opt.optimize.forward.load_policy import load_policy
from dpo_opt.optimize.forward.logps import Head
from dpo_opt.optimize.forward.packing import Batch, Group, Segment
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.measure_parity import measure_parity
from dpo_opt.optimize.parity import Parity
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.pairs import LogpArray, ScoredPair

CPU = torch.device("cpu")
Pairs = list[ScoredPair]
Patch = pytest.MonkeyPatch


def _segments(change: Callable[[Segment], Segment]) -> Callable[[Patch, Policy], None]:
    """Every segment attends to other keys than its own."""

    def plant(patch: Patch, _: Policy) -> None:
        exact = packing.pack

        def pack(groups: Sequence[Group]) -> Batch:
            batch = exact(groups)
            batch.model_kwargs["segments"] = tuple(map(change, batch.model_kwargs["segments"]))  # type: ignore[arg-type]
            return batch

        patch.setattr(policy, "pack", pack)

    return plant


def _mask(change: Callable[[Tensor, int, int], Tensor]) -> Callable[[Patch, Policy], None]:
    """Every row of a segment sees other keys; its output is computed from the changed mask."""

    def plant(patch: Patch, _: Policy) -> None:
        exact = F.scaled_dot_product_attention

        def attend(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
            rows, columns = query.shape[2], key.shape[2]
            mask = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
            settings |= {"attn_mask": change(mask, rows, columns), "is_causal": False}
            return exact(query, key, value, **settings)

        patch.setattr(attention.F, "scaled_dot_product_attention", attend)

    return plant


def _rows_before(count: int | None) -> Callable[[Patch, Policy], None]:
    """Every segment also sees rows that stand before it in the pack, another sequence's."""

    def plant(patch: Patch, _: Policy) -> None:
        exact = attention.segment_attention

        def leaking(
            module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **settings: Any
        ) -> Any:
            exact(module, query, key, value, mask, **settings)  # it notes the call
            groups = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
            parts = []
            for start, stop, prefix_start, prefix_stop in settings["segments"]:
                first = 0 if count is None else max(0, start - count)
                seen = [*range(first, start)] if count else [*range(start)]
                seen = sorted({*seen, *range(prefix_start, prefix_stop)})
                k = torch.cat([key[:, :, seen], key[:, :, start:stop]], dim=2)
                v = torch.cat([value[:, :, seen], value[:, :, start:stop]], dim=2)
                allowed = torch.ones(stop - start, len(seen) + stop - start, dtype=torch.bool).tril(len(seen))
                parts.append(
                    F.scaled_dot_product_attention(
                        query[:, :, start:stop], k, v, attn_mask=allowed, scale=settings.get("scaling")
                    )
                )
            return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None

        patch.setitem(attention.AttentionInterface._global_mapping, attention.SEGMENT_ATTENTION, leaking)

    return plant


def _positions(change: Callable[[Tensor], Tensor]) -> Callable[[Patch, Policy], None]:
    def plant(patch: Patch, _: Policy) -> None:
        exact = packing.pack

        def pack(groups: Sequence[Group]) -> Batch:
            batch = exact(groups)
            batch.model_kwargs["position_ids"] = change(batch.model_kwargs["position_ids"])  # type: ignore[arg-type]
            return batch

        patch.setattr(policy, "pack", pack)

    return plant


def _batch(change: Callable[[Batch], Batch]) -> Callable[[Patch, Policy], None]:
    def plant(patch: Patch, _: Policy) -> None:
        exact = packing.pack
        patch.setattr(policy, "pack", lambda groups: change(exact(groups)))

    return plant


def _head(change: Callable[[Head], Head]) -> Callable[[Patch, Policy], None]:
    def plant(patch: Patch, _: Policy) -> None:
        exact = policy.head_of
        patch.setattr(policy, "head_of", lambda model: change(exact(model)))

    return plant


def _flip_a_bit_of_one_logit_row(patch: Patch, _: Policy) -> None:
    """The highest bit of one hidden value's exponent that keeps it finite, in the row of one token."""
    exact = policy.token_logps

    def flipped(hidden: Tensor, head: Head, targets: Tensor, **settings: Any) -> Tensor:
        hidden = hidden.clone()
        row = len(hidden) // 2
        column = int(hidden[row].abs().argmin())
        bits = hidden[row : row + 1, column].float().view(torch.int32)
        hidden[row, column] = (bits ^ (1 << 30)).view(torch.float32)[0].clamp(-1e4, 1e4)
        return exact(hidden, head, targets, **settings)

    patch.setattr(policy, "token_logps", flipped)


def _one_rope_for_the_batch(patch: Patch, loaded: Policy) -> None:
    """Frequencies follow the number of rows in the forward, as with dynamic scaling."""
    decoder: Any = decoder_of(loaded.model)
    exact = decoder.rotary_emb.forward

    def forward(x: Tensor, position_ids: Tensor) -> Any:
        return exact(x, position_ids * (1 + position_ids.shape[-1] / 4096))

    patch.setattr(decoder.rotary_emb, "forward", forward)


def _dropout(patch: Patch, loaded: Policy) -> None:
    exact = loaded.model.get_input_embeddings().forward

    def forward(ids: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(ids.shape[-1])
        embedded: Tensor = exact(ids)
        keep = torch.rand(embedded.shape, generator=generator) > 0.05
        return embedded * keep / 0.95

    patch.setattr(loaded.model.get_input_embeddings(), "forward", forward)


def _stale_weights(patch: Patch, loaded: Policy) -> None:
    """One matrix of the model is not the checkpoint's."""
    matrix = next(
        p for n, p in loaded.model.named_parameters() if n.endswith("layers.1.mlp.down_proj.weight")
    )
    patch.setattr(matrix, "data", torch.zeros_like(matrix.data))


def _shift_scored_rows(batch: Batch) -> Batch:
    """A row predicts the token after the next: hidden states of the row before are read."""
    return dataclasses.replace(batch, scored_rows=(batch.scored_rows - 1).clamp(min=0))


def _late_positions(batch: Batch) -> Batch:
    kwargs: dict[str, Any] = dict(batch.model_kwargs)
    positions = kwargs["position_ids"].clone()
    for segment in kwargs["segments"]:
        if segment.prefix_stop > segment.prefix_start:
            positions[0, segment.start : segment.stop] += 1
    return dataclasses.replace(batch, model_kwargs={**kwargs, "position_ids": positions})


FORWARD: dict[str, Callable[[Patch, Policy], None]] = {
    "a mask that also hides the row itself": _mask(
        lambda m, r, c: m.tril(c - r - 1) | ~m.tril(c - r - 1).any(1)[:, None]
    ),
    "a mask that also shows the next row": _mask(lambda m, r, c: torch.ones_like(m).tril(c - r + 1)),
    "no mask at all": _mask(lambda m, _r, _c: torch.ones_like(m)),
    "a window that the model does not have": _mask(lambda m, r, c: m.triu(c - r - 7)),
    "a prefix that ends one token early": _segments(
        lambda s: s._replace(prefix_stop=max(s.prefix_start, s.prefix_stop - 1))
    ),
    "half a prefix": _segments(
        lambda s: s._replace(prefix_stop=s.prefix_start + (s.prefix_stop - s.prefix_start) // 2)
    ),
    "no prefix": _segments(lambda s: s._replace(prefix_start=s.start, prefix_stop=s.start)),
    "each segment also sees the row before it": _rows_before(1),
    "each row sees all rows before it": _rows_before(None),
    "positions that are not restarted": _positions(lambda p: torch.arange(p.shape[-1])[None]),
    "positions one too late after the prefix": _batch(_late_positions),
    "hidden states of the row before": _batch(_shift_scored_rows),
    "the targets of the next rows": _batch(
        lambda b: dataclasses.replace(b, targets=torch.roll(b.targets, -1))
    ),
    "another temperature": _head(lambda h: h._replace(scale=h.scale * 0.9)),
    "a soft-cap that the model does not have": _head(lambda h: h._replace(softcap=15.0)),
    "one bit of one row's hidden state": _flip_a_bit_of_one_logit_row,
    "rotary embedding of the whole batch": _one_rope_for_the_batch,
    "dropout left on": _dropout,
    "one matrix of another checkpoint": _stale_weights,
}


def _changed(pair: ScoredPair, change: Callable[[LogpArray], LogpArray]) -> ScoredPair:
    return dataclasses.replace(
        pair,
        ref_chosen_token_logps=change(pair.ref_chosen_token_logps),
        ref_rejected_token_logps=change(pair.ref_rejected_token_logps),
    )


def _one_shard(pairs: Pairs, change: Callable[[ScoredPair], ScoredPair]) -> Pairs:
    """A quarter of the pairs, next to each other."""
    part = max(1, len(pairs) // 4)
    return [change(pair) if i < part else pair for i, pair in enumerate(pairs)]


def _swapped(pair: ScoredPair) -> ScoredPair:
    shorter = min(len(pair.chosen_ids), len(pair.rejected_ids))
    chosen, rejected = pair.ref_chosen_token_logps.copy(), pair.ref_rejected_token_logps.copy()
    chosen[:shorter], rejected[:shorter] = rejected[:shorter].copy(), chosen[:shorter].copy()
    return dataclasses.replace(pair, ref_chosen_token_logps=chosen, ref_rejected_token_logps=rejected)


def _bit(pairs: Pairs) -> Pairs:
    """The exponent's second bit of one value, which makes -2 to -4 of it -8 to -16 or more."""

    def flip(values: LogpArray) -> LogpArray:
        found = values.copy()
        place = int(np.abs(found).argmax())
        found.view(np.int32)[place] ^= 1 << 24
        return found

    middle = len(pairs) // 2
    return [_changed(pair, flip) if i == middle else pair for i, pair in enumerate(pairs)]


CACHE: dict[str, Callable[[Pairs], Pairs]] = {
    "sides swapped": lambda pairs: [_swapped(pair) for pair in pairs],
    "values of the token before": lambda pairs: [_changed(pair, lambda v: np.roll(v, 1)) for pair in pairs],
    "one shard shifted by a token": lambda pairs: _one_shard(
        pairs, lambda pair: _changed(pair, lambda v: np.roll(v, 1))
    ),
    "one shard of another temperature": lambda pairs: _one_shard(
        pairs, lambda pair: _changed(pair, lambda v: v * np.float32(0.8))
    ),
    "another pair's values": lambda pairs: [
        _changed(pair, lambda v, other=other: np.resize(other.ref_chosen_token_logps, len(v)))
        for pair, other in zip(pairs, [*pairs[1:], pairs[0]], strict=True)
    ],
    "a bit of one value": _bit,
    "a constant bias": lambda pairs: [_changed(pair, lambda v: v - np.float32(0.05)) for pair in pairs],
    "a value that is no number": lambda pairs: _one_shard(
        pairs,
        lambda pair: _changed(pair, lambda v: np.where(np.arange(len(v)) == 0, np.nan, v).astype(np.float32)),
    ),
}


@contextlib.contextmanager
def planted(name: str, loaded: Policy) -> Iterator[None]:
    """The forward has the defect while the block runs."""
    with pytest.MonkeyPatch.context() as patch:
        FORWARD[name](patch, loaded)
        yield


class Scored:
    """A policy that packs, and the pairs that were scored with it."""

    def __init__(self, folder: Path, pairs: list[ScoredPair], dtype: str) -> None:
        self.folder, self.pairs, self.dtype = folder, pairs, dtype
        self.policy = load_policy(folder, dtype=getattr(torch, dtype), device=CPU, trainable=True)
        assert self.policy.packs

    def parity(self, pairs: list[ScoredPair] | None = None) -> Parity:
        return measure_parity(self.policy, self.pairs if pairs is None else pairs, cached_dtype=self.dtype)

    def probe_objects(self) -> bool:
        """Whether loading would have refused the model, or not have packed it."""
        try:
            packs, _ = choose_layout(self.policy.model, CPU, self.policy.dtype, folder=self.folder)
        except ConfigError:
            return True
        finally:
            decoder_of(self.policy.model).set_attn_implementation(SEGMENT_ATTENTION)
        return not packs

    def noticed_by(self, name: str) -> tuple[bool, list[str]]:
        """Of a defect of the forward: whether the probe objects, and which checks of parity fail."""
        with planted(name, self.policy):
            return self.probe_objects(), failed(self.parity())


def failed(parity: Parity) -> list[str]:
    return [check.name for check in parity.checks if not check.ok]
