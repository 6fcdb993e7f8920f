"""Sums the two gradients of a weight that is both embedding and head: rounded once, and in less memory.

In half precision: the head's gradient has a row for every token, and is summed in fp32. Autograd would round
it to bf16, sum the embedding's in bf16 on a CPU, and round their sum again. Few rows have both: those of the
micro-batch's own tokens. The head hands these over in fp32, and the embedding returns the sums. So the two
gradients that autograd adds have no row in common, and the memory is that of the micro-batch's rows.

In fp32 on a CPU: autograd holds the head's gradient until it has the embedding's, makes that as large, and a
third for their sum. Here the embedding adds its few rows to the first, and has no gradient of its own. On a
GPU such an addition would depend on the order of its threads.

    T = rows of a micro-batch, d = hidden size, V = vocabulary
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from dpo_opt.optimize.forward.device_path import takes_gpu_path


class TiedRows:
    """The head's gradient of a micro-batch's own tokens, on its way to the embedding's backward.

    Args:
        ids: The micro-batch's tokens.
        whole: Whether the head's whole gradient is handed over, for the embedding to be added to it.
    """

    def __init__(self, ids: Tensor, *, whole: bool) -> None:
        self._ids = ids.flatten()
        self._whole: Tensor | None = None  # (V, d) float32
        self._head: Tensor | None = None  # (T, d) float32; the same for equal tokens
        self._takes_whole = whole

    def take(self, gradient: Tensor) -> None:
        """Take these tokens' rows out of the head's (V, d) gradient, which is changed; or the whole of it."""
        if self._takes_whole:
            self._whole = gradient
            return
        self._head = gradient[self._ids].float()
        gradient.index_fill_(0, self._ids, 0)

    def add_to_whole(self, upstream: Tensor) -> bool:
        """Add (T, d) gradients of each row's embedding to the head's gradient, if that was handed over."""
        whole, self._whole = self._whole, None
        if whole is None:
            return False
        whole.index_add_(0, self._ids, upstream)
        return True

    def sums(self, upstream: Tensor) -> Tensor:
        """(T, d) float32 gradient of each row's token: of embedding and head, over all rows with that token.

        Args:
            upstream: (T, d) gradient of each row's embedding.
        """
        head, self._head = self._head, None
        # Equal tokens get one number below T. Asking how many there are would make the CPU wait for a GPU.
        ordered, order = self._ids.sort()
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[1:] = ordered[1:] != ordered[:-1]
        number = torch.empty_like(order).scatter_(0, order, first.cumsum(0) - 1)
        summed = torch.ops.aten.embedding_dense_backward(
            upstream.float(), number, len(number), padding_idx=-1, scale_grad_by_freq=False
        )
        found: Tensor = summed[number]
        return found if head is None else found.add_(head)


class _TiedEmbedding(torch.nn.Embedding):
    """An embedding whose weight is the head's too."""

    rows: TiedRows | None = None
    """Of the newest forward, if it is differentiable, and the weight in half precision or on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        whole = self.weight.dtype == torch.float32
        differentiable = torch.is_grad_enabled() and self.weight.requires_grad
        if not differentiable or (whole and takes_gpu_path(self.weight.device)):
            self.rows = None
            return super().forward(input)
        self.rows = TiedRows(input, whole=whole)
        found: Tensor = _Lookup.apply(self.weight, input, self.padding_idx, self.rows)  # type: ignore[no-untyped-call]
        return found


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: int | None, rows: TiedRows) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype, ctx.padding, ctx.rows = weight.shape, weight.dtype, padding, rows
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ids = ctx.saved_tensors[0].flatten()
        upstream = grad.reshape(len(ids), -1)
        if ctx.padding is not None:
            upstream = upstream.masked_fill((ids == ctx.padding).unsqueeze(1), 0)
        if ctx.rows.add_to_whole(upstream):
            return None, None, None, None
        sums = ctx.rows.sums(upstream).to(ctx.dtype)
        # Rows of equal tokens are equal.
        return grad.new_zeros(ctx.shape, dtype=ctx.dtype).index_copy_(0, ids, sums), None, None, None


def sum_tied_gradients(model: PreTrainedModel) -> None:
    """Prepare a model for training. One whose embedding and head have different weights is left as it is."""
    embedding: Any = model.get_input_embeddings()
    if (
        not isinstance(embedding, torch.nn.Embedding)
        or embedding.weight is not model.get_output_embeddings().weight
    ):
        return
    kind = type(embedding)
    # Some classes scale what they look up: their lookup itself is replaced.
    tied = (_TiedEmbedding,) if kind is torch.nn.Embedding else (kind, _TiedEmbedding)
    embedding.__class__ = type(kind.__name__, tied, {})


def tied_rows(model: PreTrainedModel) -> TiedRows | None:
    """Of the newest forward, for its head; None if there are none to hand over."""
    return getattr(model.get_input_embeddings(), "rows", None)
