"""``Policy``: a causal language model with batches in and token log-probs out.

Loading measures (probe.py) whether the packed forward is exact for the model at hand. If it is not (recurrent
layers, for one), padded rows are used.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_opt.optimize.forward.architecture import decoder_of, head_of
from dpo_opt.optimize.forward.attention import PADDED_ATTENTION, SEGMENT_ATTENTION
from dpo_opt.optimize.forward.logps import token_logps
from dpo_opt.optimize.forward.packing import (
    Batch,
    Group,
    pack,
    packed_size,
    pad,
    padded_width,
    plan_bins,
    plan_padded_bins,
)
from dpo_opt.optimize.forward.precision import computing_in, full_precision_products
from dpo_opt.optimize.forward.probe import Probe
from dpo_opt.optimize.forward.tied_gradients import tied_rows
from dpo_opt.schemas.pairs import TokenSequence


@dataclass(frozen=True, slots=True)
class Policy:
    """A loaded model, and how batches are laid out for it."""

    model: PreTrainedModel
    device: torch.device
    dtype: torch.dtype
    """Compute dtype of the forward; parameters keep their own."""
    packs: bool
    """False if only padded rows are exact for this model."""
    probe: Probe | None = None
    """The measurements that the layout was chosen by; None if the caller chose it."""

    @property
    def layout(self) -> Callable[[Sequence[Group]], Batch]:
        """``pack``, or ``pad`` if packing is not exact for this model."""
        return pack if self.packs else pad

    def rows(self, group: Group) -> int:
        """Rows that a group takes in a forward of its own."""
        return packed_size(group) if self.packs else len(group) * padded_width(group)

    def bins(self, groups: Sequence[Group], budget: int) -> list[list[int]]:
        """Groups that share a forward, as lists of indices; each has at most ``budget`` rows with padding.

        A group larger than the budget gets a forward of its own.
        """
        if self.packs:
            return plan_bins([packed_size(group) for group in groups], budget)
        return plan_padded_bins(groups, budget)

    def batch_logps(self, batch: Batch, *, log_squares: Tensor | None = None) -> Tensor:
        """(S,) float32 log-probs, in nats, of the batch's targets; differentiable.

        ``log_squares`` is filled as ``token_logps`` does.
        """
        with full_precision_products():
            hidden = self.batch_states(batch)
            # Outside autocast, which would round the logits.
            return token_logps(
                hidden,
                head_of(self.model),
                batch.targets,
                dtype=self.dtype,
                log_squares=log_squares,
                tied=tied_rows(self.model),
            )

    def batch_states(self, batch: Batch) -> Tensor:
        """(S, d) hidden states that predict the batch's targets."""
        with full_precision_products(), computing_in(self.dtype, self.model, self.device):
            output = decoder_of(self.model)(input_ids=batch.input_ids, use_cache=False, **batch.model_kwargs)
        states: Tensor = output.last_hidden_state.flatten(0, 1)[batch.scored_rows]
        return states

    def sequence_logps(self, groups: Sequence[Group]) -> list[Tensor]:
        """One (C,) tensor of token log-probs per sequence, on the policy's device."""
        batch = self.layout(groups).to(self.device)
        return list(torch.split(self.batch_logps(batch), batch.lengths))


@contextlib.contextmanager
def one_by_one(policy: Policy) -> Iterator[Callable[[TokenSequence], Tensor]]:
    """Gives a function from one sequence to its token log-probs, (C,), computed in a forward of its own.

    It uses padded attention even if the policy packs, so that the result does not depend on packing.
    """
    decoder, packed = decoder_of(policy.model), policy.packs
    if packed:
        decoder.set_attn_implementation(PADDED_ATTENTION)
    alone = replace(policy, packs=False)
    try:
        yield lambda sequence: alone.sequence_logps([(sequence,)])[0]
    finally:
        if packed:
            decoder.set_attn_implementation(SEGMENT_ATTENTION)


def default_device() -> torch.device:
    """CUDA if there is a GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` resolved: bfloat16 on a GPU, float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype
