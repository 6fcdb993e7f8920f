"""Balances a step's pairs over the processes (GPUs). Every process computes the same division.

FSDP makes the processes move through the layers together, so each micro-batch takes as long as its slowest
process. Pairs are therefore put into packs of equal cost, and every process gets equally many packs.
"""

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from dpo_opt.optimize.forward.architecture import decoder_of, head_of
from dpo_opt.optimize.forward.packing import Group, packed_size, shared_lengths
from dpo_opt.optimize.forward.policy import Policy


class ForwardCost(NamedTuple):
    """Floating-point operations of a forward: per row, per key and per scored token."""

    per_row: float
    """For the products of one row with the weights of all layers."""
    per_key: float
    """For one row's attention to one key, in all layers."""
    per_scored: float
    """For the head's product for one scored token."""


def forward_cost(policy: Policy) -> ForwardCost:
    """The cost of a model, from the sizes of its decoder and head. Call it before sharding.

    Of a layer's experts only those that a row visits are counted. Vision towers are not: they do not run.
    """
    decoder, head = decoder_of(policy.model), head_of(policy.model).weight
    config = policy.model.config.get_text_config()
    embeddings = (m for m in decoder.modules() if isinstance(m, torch.nn.Embedding))
    # Embeddings are looked up, not multiplied with.
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
    # Older models name the projection differently; their heads divide the hidden state among them.
    return config.hidden_size * config.num_hidden_layers if hasattr(config, "num_attention_heads") else 0


def group_cost(group: Group, cost: ForwardCost) -> float:
    """Floating-point operations of one forward of a packed group."""
    keys = 0.0
    for shared, sequence in zip(shared_lengths(group), group, strict=True):
        own = len(sequence.prompt_ids) + len(sequence.completion_ids) - 1 - shared
        keys += own * shared + own**2 / 2
    scored = sum(len(sequence.completion_ids) for sequence in group)
    return cost.per_row * packed_size(group) + cost.per_key * keys + cost.per_scored * scored


def balance(
    policy: Policy, groups: Sequence[Group], *, budget: int, cost: ForwardCost, ranks: int
) -> list[list[list[int]]]:
    """Divide a step's pairs into micro-batches, and the micro-batches among the processes.

    Args:
        policy: Decides whether rows are packed or padded, and with it how many rows a pair takes.
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
        # With fewer bins than processes, some processes would be idle.
        while len(bins) < min(ranks, len(groups)):
            budget = budget * 3 // 4
            bins = policy.bins(groups, budget)
    return _deal(bins, costs, ranks)


def even_bins(sizes: Sequence[int], costs: Sequence[float], *, budget: int, ranks: int) -> list[list[int]]:
    """Indices in bins of about equal cost and at most ``budget`` rows.

    The costliest item goes first, each to the cheapest bin so far (Graham's LPT rule). The number of bins is
    a multiple of ``ranks``, as small as the rows allow. Empty bins are left out.
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
    """Give bins of similar cost to the processes at the same time, so that none waits long for another."""
    totals = [sum(costs[i] for i in found) for found in bins]
    ordered = sorted(range(len(bins)), key=lambda b: (-totals[b], b))
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for start in range(0, len(ordered), ranks):
        # Within a round, the costliest bin goes to the process with the least cost so far.
        free = sorted(range(ranks), key=lambda rank: (loads[rank], rank))
        found = ordered[start : start + ranks]
        for place, rank in enumerate(free):
            dealt[rank].append(bins[found[place]] if place < len(found) else [])
            loads[rank] += totals[found[place]] if place < len(found) else 0.0
    return dealt
