"""Losses of all pairs of a step, and weights of tokens and pairs: no cut into micro-batches changes them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from counted_pairs import masked_pairs, sides_of
from torch import Tensor
from torchrun_steps import ALONE
from transformers import PreTrainedModel

from dpo_opt.optimize import TrainConfig, preference_loss
from dpo_opt.optimize.forward.balance import ForwardCost
from dpo_opt.optimize.forward.logps import Head, token_logps
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.losses.pair_inputs import LossInputs
from dpo_opt.optimize.losses.running import Running
from dpo_opt.optimize.pair_results import PairResults
from dpo_opt.optimize.step import Batching, forward_pairs
from dpo_opt.optimize.stop_signals import StopSignals
from dpo_opt.schemas.pairs import ScoredPair

COST = ForwardCost(per_row=1e9, per_key=1e3, per_scored=1e6)
BEFORE = Running(steps=4, completions=40, reward=0.3, margin=0.2, spread=0.5)
SETTINGS: dict[str, dict[str, Any]] = {
    "bco_pair": {"loss_type": "bco_pair"},
    "kto": {"loss_type": "kto", "desirable_weight": 1.5, "undesirable_weight": 0.6},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired", "desirable_weight": 1.5},
    "kto_pair": {"loss_type": "kto_pair"},
    "aot": {"loss_type": "aot", "label_smoothing": 0.1},
    "aot_unpaired": {"loss_type": "aot_unpaired"},
    "beta_dpo": {"loss_type": "beta_dpo", "beta_dpo_filtered": 0.3},
    "MPO": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "LD": {"loss_type": "sigmoid", "ld_alpha": 0.4},
    "WPO": {"loss_type": "sigmoid", "use_weighting": True},
    "all": {"loss_type": ["kto_pair", "ipo"], "ld_alpha": 0.0, "use_weighting": True},
}


def config_of(settings: dict[str, Any]) -> TrainConfig:
    return TrainConfig.model_validate({"shards": "s", "model": "m", "output_dir": "o", **settings})


def pairs_with_shared_sides() -> list[ScoredPair]:
    """With masks; in addition each of two prompts has two pairs more, of completions that are there."""
    pairs = masked_pairs()
    for first, mirrored in ((0, False), (2, True)):
        one, other = pairs[first], pairs[first + 3]
        longer = dataclasses.replace(
            one,
            row=len(pairs),
            rejected_ids=other.chosen_ids,
            rejected_mask=other.chosen_mask,
            ref_rejected_token_logps=other.ref_chosen_token_logps,
        )
        pairs.append(longer)
        if mirrored:
            swapped = dataclasses.replace(
                one,
                row=len(pairs),
                chosen_ids=one.rejected_ids,
                chosen_mask=one.rejected_mask,
                ref_chosen_token_logps=one.ref_rejected_token_logps,
                rejected_ids=other.chosen_ids,
                rejected_mask=other.chosen_mask,
                ref_rejected_token_logps=other.ref_chosen_token_logps,
            )
            pairs.append(swapped)
    # Which only a loss of unpaired rows reads.
    return [dataclasses.replace(pair, label=pair.row % 3 != 1) for pair in pairs]


def pairs_of(settings: dict[str, Any]) -> list[ScoredPair]:
    """The pairs of a case; kto's have a reference so far below the policy that z0 is above 0."""
    pairs = pairs_with_shared_sides()
    if settings["loss_type"] != "kto":
        return pairs
    return [
        dataclasses.replace(
            pair,
            ref_chosen_token_logps=pair.ref_chosen_token_logps - 4,
            ref_rejected_token_logps=pair.ref_rejected_token_logps - 4,
        )
        for pair in pairs
    ]


def run(
    policy: Policy, settings: dict[str, Any], *, budget: int, backward: bool = True
) -> tuple[PairResults, dict[str, Tensor]]:
    policy.model.zero_grad(set_to_none=True)
    pairs = pairs_of(settings)
    with torch.set_grad_enabled(backward):
        results = forward_pairs(
            policy,
            pairs,
            config_of(settings),
            batching=Batching(budget=budget, cost=COST, world=ALONE),
            weights=None if "aot" in str(settings["loss_type"]) else [0.5 + 0.1 * p.row for p in pairs],
            running=BEFORE,
            backward=backward,
            stop=StopSignals(),
        )
    named = policy.model.named_parameters()
    return results, {name: p.grad.to_dense().clone() for name, p in named if p.grad is not None}


def full(model: PreTrainedModel, prompt: np.ndarray, ids: np.ndarray, mask: np.ndarray | None) -> Tensor:
    """(counted, 2) log-probs of the counted tokens and logs of the sums of squares, from whole logits."""
    joined = torch.from_numpy(np.concatenate([prompt, ids]).astype(np.int64))
    logps = model(input_ids=joined[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
    own = logps.gather(1, joined[1:, None]).squeeze(1)
    both = torch.stack([own, (logps.exp() ** 2).sum(-1).log()], dim=1)[len(prompt) - 1 :]
    return both if mask is None else both[torch.from_numpy(mask)]


def by_hand(model: PreTrainedModel, settings: dict[str, Any], *, training: bool) -> tuple[Tensor, Tensor]:
    """(pairs,) losses and (pairs, 2) rewards, from each pair by itself; differentiable."""
    pairs, config = pairs_of(settings), config_of(settings)
    alpha = 1.0 if config.ld_alpha is None else config.ld_alpha
    rows, agreements = [], []
    for pair in pairs:
        sides = [(full(model, pair.prompt_ids, ids, mask), mask, ref) for ids, mask, ref in sides_of(pair)]
        shared = min(len(values) for values, _, _ in sides)
        row: list[Tensor] = []
        for values, mask, ref in sides:
            own, reference = values[:, 0], torch.from_numpy(ref if mask is None else ref[mask]).double()
            row += [x[:shared].sum() + alpha * x[shared:].sum() for x in (own, reference)]
            row.append(torch.tensor(float(len(own))))
        rows.append(torch.stack([r.double() for r in row]))
        agreements.append(torch.stack([(v[:, 0] - v[:, 1]).mean() for v, _, _ in sides]).sum().exp())
    chosen, ref_chosen, len_c, rejected, ref_rejected, len_r = torch.stack(rows).unbind(1)
    inputs = LossInputs(
        chosen,
        rejected,
        ref_chosen,
        ref_rejected,
        len_c.long(),
        len_r.long(),
        beta=0.1,
        running=BEFORE,
        labels=torch.tensor([pair.row % 3 != 1 for pair in pairs]),
    )
    if training:
        running = BEFORE.after(inputs.chosen_rewards.detach(), inputs.rejected_rewards.detach())
        draws = torch.from_numpy(np.random.default_rng([config.seed, 5, 1]).random(len(pairs)))
        inputs = inputs._replace(running=running, draws=draws)
    found = preference_loss(
        config.loss_type, inputs, loss_weights=config.loss_weights, **config.loss_options
    ).losses
    if config.use_weighting:
        found = found * torch.stack(agreements).detach()
    if "aot" not in str(settings["loss_type"]):
        found = found * torch.tensor([0.5 + 0.1 * pair.row for pair in pairs])
    return found, torch.stack([inputs.chosen_rewards, inputs.rejected_rewards], dim=1)


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_and_gradients_are_those_of_all_pairs_together(
    name: str, policy: Policy, stock_model: PreTrainedModel
) -> None:
    stock_model.zero_grad(set_to_none=True)
    losses, rewards = by_hand(stock_model, SETTINGS[name], training=True)
    losses.mean().backward()
    right = {n: p.grad.clone() for n, p in stock_model.named_parameters() if p.grad is not None}
    # One micro-batch, several, and one for each group of pairs.
    for budget in (10_000, 60, 1):
        found, gradients = run(policy, SETTINGS[name], budget=budget)
        torch.testing.assert_close(found.losses, losses.detach(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found.chosen_rewards, rewards[:, 0].detach(), atol=1e-5, rtol=0)
        torch.testing.assert_close(found.rejected_rewards, rewards[:, 1].detach(), atol=1e-5, rtol=0)
        assert not found.losses.requires_grad
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(gradient, right[parameter], atol=2e-6, rtol=1e-4)
    with torch.no_grad():
        expected, _ = by_hand(stock_model, SETTINGS[name], training=False)
    found, gradients = run(policy, SETTINGS[name], budget=60, backward=False)
    assert not gradients
    torch.testing.assert_close(found.losses, expected, atol=1e-6, rtol=1e-5)


def test_padded_rows_weigh_alike(policy: Policy) -> None:
    expected, right = run(policy, SETTINGS["all"], budget=60)
    policy.model.get_decoder().set_attn_implementation("sdpa")
    found, gradients = run(dataclasses.replace(policy, packs=False), SETTINGS["all"], budget=60)
    torch.testing.assert_close(found.losses, expected.losses, atol=1e-6, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, right[name], atol=1e-6, rtol=1e-4)


def test_ld_alpha_of_1_is_no_weighing_and_the_log_probs_written_are_whole(policy: Policy) -> None:
    plain, _ = run(policy, {"loss_type": "sigmoid"}, budget=60)
    one, _ = run(policy, {"loss_type": "sigmoid", "ld_alpha": 1.0}, budget=60)
    torch.testing.assert_close(one.losses, plain.losses, atol=1e-9, rtol=0)
    none, _ = run(policy, {"loss_type": "sigmoid", "ld_alpha": 0.0}, budget=60)
    assert torch.equal(none.chosen_logps, plain.chosen_logps)
    assert not torch.equal(none.losses, plain.losses)


Make = Callable[[], Head]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("need", [True, False])
def test_sums_of_squares_come_from_the_heads_blocks(
    softcap: float | None, need: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_opt.optimize.forward import logps

    # Blocks of 7 rows, of which some are kept for backward.
    monkeypatch.setattr(logps, "_ON_CPU", logps._Bytes(block=4 * 7 * 50, part=4 * 3 * 50, kept=4 * 14 * 50))
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 8, generator=generator).requires_grad_(need) for n in (30, 50))
    head = Head(weight, None, 0.5, softcap)
    targets = torch.randint(0, 50, (30,), generator=generator)
    squares = torch.empty(30)
    found = token_logps(hidden, head, targets, log_squares=squares)
    logits = 0.5 * (hidden.detach().double() @ weight.detach().double().T)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected = (logits.log_softmax(-1).exp() ** 2).sum(-1).log()
    torch.testing.assert_close(squares.double(), expected, atol=1e-5, rtol=0)
    assert torch.equal(found, token_logps(hidden, head, targets))
