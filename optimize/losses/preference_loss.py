"""The preference losses by name: pure functions of pairs' log-probs, and their weighted sums."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_opt.optimize.losses.difference import discopop, exo_pair, hinge, robust, sigmoid, sigmoid_norm
from dpo_opt.optimize.losses.divergences import (
    alpha_divergence,
    forward_kl,
    js_divergence,
    reverse_kl,
)
from dpo_opt.optimize.losses.each_side import apo_down, apo_zero, nca_pair
from dpo_opt.optimize.losses.pair_inputs import LossInputs
from dpo_opt.optimize.losses.reference_free import cpo, orpo, sft, simpo, unlikelihood
from dpo_opt.optimize.losses.regression import cal_dpo, ipo, ipo_sum, sppo_hard
from dpo_opt.optimize.losses.shifted import dpop, odpo, rdpo, rpo
from dpo_opt.optimize.losses.unpaired import apo_zero_unpaired, kto
from dpo_opt.optimize.losses.whole_step import aot, aot_unpaired, bco_pair, beta_dpo, kto_pair

Function = Callable[..., Tensor]


def _by_name(*functions: Function) -> Mapping[str, Function]:
    return {function.__name__: function for function in functions}


_WITHOUT_REFERENCE = _by_name(simpo, cpo, orpo, sft, unlikelihood)
_WITH_MARGINS = _by_name(odpo, rpo)
_RANKED = _by_name(aot, aot_unpaired)
_WITH_RUNNING = _by_name(bco_pair, beta_dpo)
_UNPAIRED = _by_name(kto, apo_zero_unpaired)
_OF_SEVERAL = _by_name(kto, kto_pair, *_RANKED.values(), beta_dpo)
LOSSES = {
    **_by_name(sigmoid, robust, hinge, exo_pair, discopop, sigmoid_norm),
    **_by_name(ipo, ipo_sum, sppo_hard, cal_dpo),
    **_by_name(nca_pair, apo_zero, apo_down),
    **_by_name(rdpo, dpop),
    **_WITH_MARGINS,
    **_by_name(bco_pair),
    **_UNPAIRED,
    **_OF_SEVERAL,
    **_WITHOUT_REFERENCE,
}
DIVERGENCES = _by_name(reverse_kl, forward_kl, js_divergence, alpha_divergence)
REFERENCE_FREE = frozenset(_WITHOUT_REFERENCE)
"""Losses that do not change with the reference's log-probs."""
NEED_MARGINS = frozenset(_WITH_MARGINS)
"""Losses that read ``data_margins``."""
RANKED = frozenset(_RANKED)
"""Losses of ranks among a step's pairs, so that a term belongs to no one pair."""
UNPAIRED = frozenset(_UNPAIRED)
"""Losses of rows with one completion and a label each."""
NEED_RUNNING = frozenset(_WITH_RUNNING)
"""Losses that read ``running``."""
NEED_SEVERAL = frozenset(_OF_SEVERAL)
"""Losses that say nothing of a single pair."""
WHOLE_STEP = NEED_SEVERAL | NEED_RUNNING
"""Losses that must see all pairs of a step at once."""
_DIVERGENCE = "divergence"


class PreferenceLoss(NamedTuple):
    """Loss and rewards of each pair."""

    losses: Tensor  # (pairs,)
    chosen_rewards: Tensor  # (pairs,) detached; beta x log-ratio
    rejected_rewards: Tensor  # (pairs,) detached


@functools.cache
def options_of(name: str) -> Mapping[str, object]:
    """A loss's or a divergence's options and their defaults; ``inspect.Parameter.empty`` where it has none.

    Args:
        name: A key of ``LOSSES`` or ``DIVERGENCES``.
    """
    parameters = inspect.signature({**LOSSES, **DIVERGENCES}[name]).parameters.values()
    return MappingProxyType({p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY})


def is_unpaired(names: Iterable[str]) -> bool:
    """Whether losses are of rows with one completion and a label each; they go with no loss of pairs."""
    return not UNPAIRED.isdisjoint(names)


def takes_divergence(name: str) -> bool:
    """Whether a loss may have another divergence than the reverse KL."""
    return _DIVERGENCE in options_of(name)


def preference_loss(
    loss_type: str | Sequence[str],
    pairs: LossInputs,
    *,
    loss_weights: Sequence[float] | None = None,
    f_divergence_type: str = "reverse_kl",
    **options: float,
) -> PreferenceLoss:
    """Loss and rewards of each pair.

    Args:
        loss_type: A key of ``LOSSES``, or several, whose losses are added.
        pairs: A batch of pairs; for losses of ``WHOLE_STEP`` all pairs of a step.
        loss_weights: What each loss is multiplied by; None: 1.
        f_divergence_type: A key of ``DIVERGENCES``, for the losses that take one.
        options: Of the losses and the divergence, such as ``label_smoothing``. Each gets those that it has.

    Raises:
        TypeError: No loss has an option that is given, or one lacks an option that has no default.
    """
    names = [loss_type] if isinstance(loss_type, str) else loss_type
    of_divergence = {name: options[name] for name in options_of(f_divergence_type) if name in options}
    divergence = functools.partial(DIVERGENCES[f_divergence_type], **of_divergence)
    unused = set(options) - set(of_divergence)
    losses = torch.zeros_like(pairs.chosen_logps)
    for name, weight in zip(names, loss_weights or [1.0] * len(names), strict=True):
        taken: dict[str, object] = {key: options[key] for key in options_of(name) if key in options}
        unused -= taken.keys()
        if takes_divergence(name):
            taken[_DIVERGENCE] = divergence
        losses = losses + weight * LOSSES[name](pairs, **taken)
    if unused:
        raise TypeError(f"{', '.join(names)}: no option {', '.join(sorted(unused))}")
    return PreferenceLoss(losses, pairs.chosen_rewards.detach(), pairs.rejected_rewards.detach())
