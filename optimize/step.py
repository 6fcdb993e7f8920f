"""Forward and backward of one step's pairs: log-probs, losses, gradients, and the sums for the metrics."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.forward.balance import ForwardCost, balance
from dpo_opt.optimize.forward.packing import to_device
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.forward.prompt_groups import PromptGroup, prompt_groups
from dpo_opt.optimize.losses.pair_inputs import LossInputs
from dpo_opt.optimize.losses.preference_loss import preference_loss
from dpo_opt.optimize.processes.distributed import World, sum_over_ranks
from dpo_opt.optimize.processes.fsdp import announce_micro_batch, join_empty
from dpo_opt.optimize.run_folder import Metrics
from dpo_opt.optimize.stop_signals import StopSignals
from dpo_opt.schemas.pairs import ScoredPair

SeeLogps = Callable[[Sequence[PromptGroup], Sequence[Tensor]], None]
"""Takes the groups of a micro-batch and the token log-probs of each of their sequences."""


class PairResults(NamedTuple):
    """Results of each pair of a batch, on the device: all (pairs,) float64."""

    losses: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class Batching(NamedTuple):
    """How a step's pairs become micro-batches. It changes speed and memory, not the update."""

    budget: int
    """Most rows of a micro-batch."""
    cost: ForwardCost
    """By which pairs are balanced over the processes."""
    world: World


def forward_pairs(
    policy: Policy,
    pairs: Sequence[ScoredPair],
    config: TrainConfig,
    *,
    batching: Batching,
    weights: Sequence[float] | None,
    margins: Sequence[float] | None = None,
    backward: bool,
    stop: StopSignals,
    see: SeeLogps | None = None,
) -> PairResults:
    """Compute the losses of a step's pairs in micro-batches, and add their gradients.

    The loss is the weighted sum over the step's pairs divided by their number. Neither the micro-batches nor
    the number of processes change it. Every process gets the results of all pairs. A sequence that several
    pairs have in common is computed once.

    Args:
        policy: Gradients are added to its parameters' gradients.
        pairs: The pairs of one step, the same on every process.
        config: The loss and its settings.
        batching: How pairs become micro-batches.
        weights: How much each pair counts; None: all alike.
        margins: How much better each pair's chosen is, as the data says; None where no loss reads it.
        backward: Whether to compute gradients.
        stop: Checked before every micro-batch of a single process. Several processes would have to
            communicate for each check.
        see: Called with the log-probs of each of this process's micro-batches.

    Raises:
        StopRequested: A signal came; gradients of a part of the step may be left.
    """
    world, device = batching.world, policy.device
    groups = prompt_groups(pairs, rows=policy.rows, budget=batching.budget, ranks=world.size)
    sequences = [group.sequences for group in groups]
    plans = balance(policy, sequences, budget=batching.budget, cost=batching.cost, ranks=world.size)
    plan = plans[world.rank]
    references = [[pair.ref_chosen_logps, pair.ref_rejected_logps] for pair in pairs]
    ref_logps = to_device(torch.tensor(references, dtype=torch.float64), device)
    weight, margin = (
        None if values is None else to_device(torch.tensor(values, dtype=torch.float64), device)
        for values in (weights, margins)
    )
    columns = torch.zeros(len(pairs), len(PairResults._fields), dtype=torch.float64, device=device)
    for number, members in enumerate(plan):
        if world.size == 1:
            stop.check(world)
        announce_micro_batch(policy, last=number == len(plan) - 1)
        if not members:
            join_empty(policy, backward=backward)
            continue
        places = to_device(torch.tensor([pair for i in members for pair in groups[i].pairs]), device)
        batch = policy.layout([sequences[i] for i in members])
        part = _Part(
            config,
            [groups[i] for i in members],
            batch.lengths,
            ref_logps[places],
            None if weight is None else weight[places],
            None if margin is None else margin[places],
            len(pairs),
        )
        logps = policy.batch_logps(batch.to(device))
        if see:
            see(part.groups, torch.split(logps.detach(), batch.lengths))
        results = part.results(logps)
        if backward:
            torch.autograd.backward(part.loss(results))
        columns.index_copy_(0, places, torch.stack([column.detach() for column in results], dim=1))
    return PairResults(*sum_over_ranks(columns, world).unbind(1))


@dataclass(frozen=True, slots=True)
class _Part:
    """The pairs of one micro-batch, and their share of the step's loss."""

    config: TrainConfig
    groups: Sequence[PromptGroup]
    lengths: Sequence[int]
    """Scored tokens of each sequence of the groups."""
    ref_logps: Tensor  # (pairs, 2)
    weight: Tensor | None  # (pairs,)
    margin: Tensor | None  # (pairs,)
    step_pairs: int

    def loss(self, results: PairResults) -> Tensor:
        return results.losses.sum() / self.step_pairs

    def results(self, logps: Tensor) -> PairResults:
        """The results from the pairs' token log-probs; losses and log-probs keep their gradients."""
        counts = to_device(torch.tensor(self.lengths), logps.device)
        # Their sum is known here, so a GPU is not waited for.
        owners = torch.repeat_interleave(counts, output_size=sum(self.lengths))
        # float64: a margin is a small difference of sums over hundreds of tokens.
        sums = logps.new_zeros(len(self.lengths), dtype=torch.float64).index_add(0, owners, logps.double())
        chosen, rejected = to_device(torch.tensor(_sides(self.groups)), logps.device).unbind(1)
        chosen_logps, rejected_logps = sums.index_select(0, chosen), sums.index_select(0, rejected)
        ref_chosen_logps, ref_rejected_logps = self.ref_logps.unbind(1)
        inputs = LossInputs(
            chosen_logps=chosen_logps,
            rejected_logps=rejected_logps,
            ref_chosen_logps=ref_chosen_logps,
            ref_rejected_logps=ref_rejected_logps,
            chosen_lengths=counts[chosen],
            rejected_lengths=counts[rejected],
            beta=self.config.beta,
            data_margins=self.margin,
        )
        loss = preference_loss(
            self.config.loss_type, inputs, loss_weights=self.config.loss_weights, **self.config.loss_options
        )
        losses = loss.losses if self.weight is None else loss.losses * self.weight
        return PairResults(losses, chosen_logps, rejected_logps, loss.chosen_rewards, loss.rejected_rewards)


def _sides(groups: Sequence[PromptGroup]) -> list[tuple[int, int]]:
    """Of each pair of the groups, the places of chosen and rejected among all their sequences."""
    firsts = itertools.accumulate((len(group.sequences) for group in groups), initial=0)
    return [
        (first + chosen, first + rejected)
        for first, group in zip(firsts, groups, strict=False)
        for chosen, rejected in group.sides
    ]


class MetricsWindow:
    """Sums over the pairs since the last line of metrics. They stay on the device until they are read."""

    NAMES = (
        "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
        "logps/rejected",
    )  # fmt: skip

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(self.NAMES) + 3, dtype=torch.float64, device=device)

    def add(self, results: PairResults, grad_norm: Tensor | None = None) -> None:
        """Count a step's pairs, and its gradient norm."""
        margins = results.chosen_rewards - results.rejected_rewards
        columns = torch.stack(
            [
                results.losses,
                results.chosen_rewards,
                results.rejected_rewards,
                margins,
                (margins > 0).double(),
                results.chosen_logps,
                results.rejected_logps,
                torch.ones_like(margins),
            ]
        )
        self._sums[:-2] += columns.sum(dim=1)
        if grad_norm is not None:
            self._sums[-2] += grad_norm.double()
            self._sums[-1] += 1

    def means(self, *, prefix: str = "") -> Metrics:
        """Means over the pairs, in TRL's metric names; ``grad_norm`` is the mean over the steps."""
        *sums, pairs, grad_norms, steps = self._sums.tolist()
        means: Metrics = {prefix + name: total / pairs for name, total in zip(self.NAMES, sums, strict=True)}
        if steps:
            means["grad_norm"] = grad_norms / steps
        return means

    @property
    def pairs(self) -> int:
        """Number of pairs counted."""
        return int(self._sums[-3])

    @property
    def state(self) -> list[float]:
        """The sums, exactly."""
        return list(self._sums.tolist())

    @state.setter
    def state(self, sums: list[float]) -> None:
        self._sums.copy_(torch.tensor(sums, dtype=torch.float64))
