"""Which process takes which pairs of a step: a pure function of the pairs, computed alike by all of them.

FSDP's exchanges make the processes move layer by layer together, so the time of a step is the sum over its
micro-batches of the slowest one. Pairs are therefore dealt to packs of equal cost, as many for each process.
"""

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from dpo_opt.optimize.forward.architecture import decoder_of, head_of
from dpo_opt.optimize.forward.packing import Group, packed_size, shared_length
from dpo_opt.optimize.forward.policy import Policy


class ForwardCost(NamedTuple):
    """Floating-point operations of a forward, by what they are spent on."""

    per_row: float
    """Products of one row with the weights of all layers."""
    per_key: float
    """One row's attention to one key, in all layers."""
    per_scored: float
    """The head's product for one scored token."""


def forward_cost(policy: Policy) -> ForwardCost:
    """Read from the model's decoder and head, of whose experts a row visits some; vision towers do not run.

    To be called before sharding.
    """
    decoder, head = decoder_of(policy.model), head_of(policy.model).weight
    config = policy.model.config.get_text_config()
    embeddings = (m for m in decoder.modules() if isinstance(m, torch.nn.Embedding))
    # Rows of embeddings are looked up, not multiplied with.
    others = {id(head), *(id(p) for module in embeddings for p in module.parameters())}
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    visited = getattr(config, "num_experts_per_tok", None)
    share = visited / experts if experts and visited else 1.0  # of the rows that an expert sees
    weights = sum(
        p.numel() * (share if p.ndim == 3 and p.shape[0] == experts else 1.0)
        for p in decoder.parameters()
        if p.ndim >= 2 and id(p) not in others
    )
    return ForwardCost(2.0 * weights, 4.0 * _attention_width(decoder, config), 2.0 * head.numel())


def _attention_width(decoder: torch.nn.Module, config: PretrainedConfig) -> int:
    """Query heads times their dimension, summed over the layers: each may have its own (Gemma 4)."""
    outputs = (getattr(module, "o_proj", None) for module in decoder.modules())
    widths = [getattr(output, "in_features", 0) for output in outputs]
    if any(widths):
        return sum(widths)
    # Older models have other names for it, and heads that share out the hidden state.
    return config.hidden_size * config.num_hidden_layers if hasattr(config, "num_attention_heads") else 0


def group_cost(group: Group, cost: ForwardCost) -> float:
    """Floating-point operations of one forward of a packed group."""
    shared = shared_length(group)
    keys = shared**2 / 2
    for sequence in group:
        own = len(sequence.prompt_ids) + len(sequence.completion_ids) - 1 - shared
        keys += own * shared + own**2 / 2
    scored = sum(len(sequence.completion_ids) for sequence in group)
    return cost.per_row * packed_size(group) + cost.per_key * keys + cost.per_scored * scored


def balance(
    policy: Policy, groups: Sequence[Group], *, budget: int, cost: ForwardCost, ranks: int
) -> list[list[list[int]]]:
    """Micro-batches of each process.

    Args:
        policy: Decides the layout, and with it the rows of a micro-batch.
        groups: All pairs of the step.
        budget: Most rows of a micro-batch; a larger group gets one of its own.
        cost: See ``forward_cost``.
        ranks: Number of processes. For one, the micro-batches are ``policy.bins`` in their order.

    Returns:
        For each process, equally many lists of indices of ``groups``; an empty list is a micro-batch
        without pairs. Every group is in exactly one of them.
    """
    if ranks == 1:
        return [policy.bins(groups, budget)]
    costs = [group_cost(group, cost) for group in groups]
    if policy.packs:
        bins = even_bins([packed_size(group) for group in groups], costs, budget=budget, ranks=ranks)
    else:
        bins = policy.bins(groups, budget)
        # Fewer than there are processes: some would only watch.
        while len(bins) < min(ranks, len(groups)):
            budget = budget * 3 // 4
            bins = policy.bins(groups, budget)
    return _deal(bins, costs, ranks)


def even_bins(sizes: Sequence[int], costs: Sequence[float], *, budget: int, ranks: int) -> list[list[int]]:
    """Indices in bins of about equal cost and at most ``budget`` rows.

    The costliest goes first, each to the bin with the least so far (Graham's LPT rule). Bins are as few as
    the rows allow, in a multiple of ``ranks``; only where there are fewer items, there are fewer bins.
    """
    count = ranks * max(1, math.ceil(sum(sizes) / budget / ranks))
    while True:
        bins = _longest_first(sizes, costs, budget, count)
        if bins is not None:
            return [found for found in bins if found]
        count += ranks


def _longest_first(
    sizes: Sequence[int], costs: Sequence[float], budget: int, count: int
) -> list[list[int]] | None:
    bins: list[list[int]] = [[] for _ in range(count)]
    room = [budget] * count
    cheapest = [(0.0, number) for number in range(count)]
    for item in sorted(range(len(sizes)), key=lambda i: (-costs[i], i)):
        full = []
        while cheapest:
            total, number = heapq.heappop(cheapest)
            if sizes[item] <= room[number] or not bins[number]:
                break
            full.append((total, number))
        else:
            return None
        bins[number].append(item)
        room[number] -= sizes[item]
        heapq.heappush(cheapest, (total + costs[item], number))
        for entry in full:
            heapq.heappush(cheapest, entry)
    return bins


def _deal(bins: Sequence[list[int]], costs: Sequence[float], ranks: int) -> list[list[list[int]]]:
    """Bins of like cost side by side, which makes the sum of the slowest ones smallest."""
    totals = [sum(costs[i] for i in found) for found in bins]
    ordered = sorted(range(len(bins)), key=lambda b: (-totals[b], b))
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for start in range(0, len(ordered), ranks):
        # Within a round, the costliest to the process with the least so far.
        free = sorted(range(ranks), key=lambda rank: (loads[rank], rank))
        found = ordered[start : start + ranks]
        for place, rank in enumerate(free):
            dealt[rank].append(bins[found[place]] if place < len(found) else [])
            loads[rank] += totals[found[place]] if place < len(found) else 0.0
    return dealt
