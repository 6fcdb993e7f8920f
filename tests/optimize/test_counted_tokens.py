"""Tokens of a completion that do not count are context: in log-probs, losses, gradients and parity."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from counted_pairs import masked_pairs, sides_of
from torch import Tensor
from torchrun_steps import ALONE
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo_opt.optimize import TrainConfig, preference_loss
from dpo_opt.optimize.forward.balance import ForwardCost
from dpo_opt.optimize.forward.packing import pack, pad, pair_group
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.losses.pair_inputs import LossInputs
from dpo_opt.optimize.measure_parity import measure_parity
from dpo_opt.optimize.run_folder import hold_logps
from dpo_opt.optimize.step import Batching, forward_pairs
from dpo_opt.optimize.stop_signals import StopSignals
from dpo_opt.optimize.transformers_scorer import HfScorer
from dpo_opt.schemas.pairs import ScoredPair, TokenSequence

FullLogps = Callable[[PreTrainedModel, TokenSequence], Tensor]
COST = ForwardCost(per_row=1e9, per_key=1e3, per_scored=1e6)


def by_hand(
    model: PreTrainedModel, pair: ScoredPair, full_logps: FullLogps
) -> list[tuple[Tensor, float, int]]:
    """Of chosen and rejected: the counting tokens' log-probs, the reference's sum, and their number."""
    found = []
    for ids, mask, reference in sides_of(pair):
        all_true = np.ones(len(ids), dtype=bool)
        counts = torch.from_numpy(all_true if mask is None else mask)
        logps = full_logps(model, TokenSequence(pair.prompt_ids, ids))
        total = float((torch.from_numpy(reference).double() * counts).sum())
        found.append((logps[counts], total, int(counts.sum())))
    return found


@pytest.mark.parametrize("layout", [pack, pad])
def test_only_counted_tokens_are_scored(
    policy: Policy, stock_model: PreTrainedModel, full_logps: FullLogps, layout: object
) -> None:
    pairs = masked_pairs()
    alone = dataclasses.replace(policy, packs=layout is pack)
    if layout is pad:
        alone.model.get_decoder().set_attn_implementation("sdpa")
    found = alone.sequence_logps([pair_group(pair) for pair in pairs])
    expected = [logps for pair in pairs for logps, _, _ in by_hand(stock_model, pair, full_logps)]
    assert [len(logps) for logps in found] == [
        count for pair in pairs for count in (pair.chosen_counted, pair.rejected_counted)
    ]
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), right, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "chosen_settings",
    [
        {"loss_type": "sigmoid"},
        {"loss_type": "sigmoid", "label_smoothing": 0.2},
        {"loss_type": "odpo", "margin_scale": 0.5},
        # Lengths, a divergence, several losses, their weights and an option, all through the trainer's step.
        {
            "loss_type": ["ipo", "discopop", "orpo", "sft"],
            "loss_weights": [0.01, 1.0, 0.5, 0.1],
            "f_divergence_type": "js_divergence",
            "discopop_tau": 0.5,
        },
    ],
    ids=["sigmoid", "smoothed", "odpo", "several"],
)
def test_losses_and_gradients_are_those_of_the_counted_tokens(
    policy: Policy, tiny_model: Path, full_logps: FullLogps, chosen_settings: dict[str, Any]
) -> None:
    pairs = masked_pairs()
    margins = [0.5 * row - 1 for row in range(len(pairs))]
    config = TrainConfig.model_validate({"shards": "s", "model": "m", "output_dir": "o", **chosen_settings})
    results = forward_pairs(
        policy,
        pairs,
        config,
        batching=Batching(budget=64, cost=COST, world=ALONE),
        weights=None,
        margins=margins,
        backward=True,
        stop=StopSignals(),
    )
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).train()
    sides = [by_hand(plain, pair, full_logps) for pair in pairs]
    sums, references, lengths = (
        [torch.stack([torch.as_tensor(value) for value in side]) for side in zip(*column, strict=True)]
        for column in (
            [[logps.sum() for logps, _, _ in pair] for pair in sides],
            [[torch.tensor(total, dtype=torch.float64) for _, total, _ in pair] for pair in sides],
            [[torch.tensor(count) for _, _, count in pair] for pair in sides],
        )
    )
    given = LossInputs(*sums, *references, *lengths, beta=0.1, data_margins=torch.tensor(margins))
    losses = preference_loss(pairs=given, **chosen_settings).losses
    torch.testing.assert_close(results.losses.detach(), losses.detach(), atol=1e-6, rtol=0)
    torch.testing.assert_close(results.chosen_logps.detach(), sums[0].detach(), atol=1e-4, rtol=0)
    losses.mean().backward()
    right = {name: value.grad for name, value in plain.named_parameters()}
    for name, value in policy.model.named_parameters():
        assert value.grad is not None
        torch.testing.assert_close(value.grad.to_dense(), right[name], atol=2e-6, rtol=1e-4)


def test_parity_and_the_table_of_pairs_are_of_the_counted_tokens(policy: Policy, tiny_model: Path) -> None:
    pairs = masked_pairs()
    sequences = [TokenSequence(pair.prompt_ids, ids) for pair in pairs for ids, _, _ in sides_of(pair)]
    logps = HfScorer(tiny_model, dtype="float32").token_logps(sequences)
    pairs = [
        dataclasses.replace(
            pair, ref_chosen_token_logps=logps[2 * i], ref_rejected_token_logps=logps[2 * i + 1]
        )
        for i, pair in enumerate(pairs)
    ]
    counts = [(pair.chosen_counted, pair.rejected_counted) for pair in pairs]
    parity = measure_parity(policy, pairs, cached_dtype="float32")
    assert parity.ok
    assert parity.tokens == sum(map(sum, counts)) < sum(len(values) for values in logps)
    zeros = torch.zeros(len(pairs))
    held = hold_logps(pairs, chosen_logps=zeros, rejected_logps=zeros, step=0, epoch=0, phase="train")
    assert [(chosen, rejected) for _, _, chosen, rejected in held.pairs] == counts

    # Of a wrong log-prob only a token that counts is told, by its place in the completion.
    pair = pairs[1]
    assert pair.chosen_mask is not None
    ignored = int(np.flatnonzero(~pair.chosen_mask)[0])
    wrong = pair.ref_chosen_token_logps.copy()
    wrong[ignored] = -20
    same = dataclasses.replace(pair, ref_chosen_token_logps=wrong)
    assert measure_parity(policy, [pairs[0], same], cached_dtype="float32").max < 1e-4
    wrong = wrong.copy()
    wrong[-1] -= 1
    off = dataclasses.replace(pair, ref_chosen_token_logps=wrong)
    found = measure_parity(policy, [pairs[0], off], cached_dtype="float32")
    assert (found.worst_row, found.worst_side, found.worst_token) == (1, "chosen", len(wrong) - 1)
