"""Forward and backward of one step's pairs: log-probs, losses, gradients, and the sums for the metrics."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.forward.balance import ForwardCost, balance
from dpo_opt.optimize.forward.packing import to_device
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.forward.prompt_groups import PromptGroup, prompt_groups
from dpo_opt.optimize.losses.pair_inputs import LossInputs
from dpo_opt.optimize.losses.preference_loss import WHOLE_STEP, preference_loss
from dpo_opt.optimize.losses.running import Running
from dpo_opt.optimize.measured import Measured, measure, reference_sums
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
    running: Running | None = None,
    backward: bool,
    stop: StopSignals,
    see: SeeLogps | None = None,
) -> PairResults:
    """Compute the losses of a step's pairs in micro-batches, and add their gradients.

    The loss is the weighted sum over the step's pairs divided by their number. Neither the micro-batches nor
    the number of processes change it. Every process gets the results of all pairs. A sequence that several
    pairs have in common is computed once.

    A loss that looks at all pairs of the step needs all their log-probs first. Where there are several
    micro-batches, they are computed once more before.

    Args:
        policy: Gradients are added to its parameters' gradients.
        pairs: The pairs of one step, the same on every process.
        config: The loss and its settings.
        batching: How pairs become micro-batches.
        weights: How much each pair counts; None: all alike.
        margins: How much better each pair's chosen is, as the data says; None where no loss reads it.
        running: The rewards of the training steps before; None: there were none.
        backward: Whether to compute gradients, and to count the pairs' rewards among those of training.
        stop: Checked before every micro-batch of a single process. Several processes would have to
            communicate for each check.
        see: Called with the log-probs of each of this process's micro-batches.

    Raises:
        StopRequested: A signal came; gradients of a part of the step may be left.
    """
    world = batching.world
    groups = prompt_groups(pairs, rows=policy.rows, budget=batching.budget, ranks=world.size)
    sequences = [group.sequences for group in groups]
    plans = balance(policy, sequences, budget=batching.budget, cost=batching.cost, ranks=world.size)
    work = _Work(policy, config, groups, plans, world, stop)
    given = _given(pairs, config, weights, margins, policy.device)
    if not WHOLE_STEP.isdisjoint(config.loss_type):
        return _of_whole_step(work, given, running or Running(), backward=backward, see=see)
    columns = torch.zeros(len(pairs), len(PairResults._fields), dtype=torch.float64, device=policy.device)
    for places, measured in work.micro_batches(backward=backward, see=see):
        part = given.at(places)
        results = _results(measured, part, part.inputs(measured, config), config)
        if backward:
            torch.autograd.backward(results.losses.sum() / len(pairs))
        columns.index_copy_(0, places, torch.stack([column.detach() for column in results], dim=1))
    return PairResults(*sum_over_ranks(columns, world).unbind(1))


def _of_whole_step(
    work: "_Work", given: "_Given", running: Running, *, backward: bool, see: SeeLogps | None
) -> PairResults:
    """Results of losses that look at all pairs at once."""
    count = len(given.ref_logps)
    # Where every process has one micro-batch, its forward is kept for backward.
    kept = backward and all(len(plan) == 1 and plan[0] for plan in work.plans)
    columns = torch.zeros(count, len(Measured._fields), dtype=torch.float64, device=work.policy.device)
    parts = []
    with torch.set_grad_enabled(kept):
        for places, part in work.micro_batches(backward=False, see=see):
            found = [torch.ones_like(part.chosen_logps) if c is None else c.detach() for c in part]
            columns.index_copy_(0, places, torch.stack(found, dim=1))
            if kept:
                parts.append((places, part))
    measured = Measured(*sum_over_ranks(columns, work.world).unbind(1))
    sides = (measured.chosen_weighed, measured.rejected_weighed)
    seen = [logps.clone().requires_grad_(backward) for logps in sides]
    measured = measured._replace(chosen_weighed=seen[0], rejected_weighed=seen[1])
    inputs = given.inputs(measured, work.config)
    if backward:
        running = running.after(inputs.chosen_rewards.detach(), inputs.rejected_rewards.detach())
        draws = np.random.default_rng([work.config.seed, running.steps, 1]).random(count)
        inputs = inputs._replace(draws=to_device(torch.from_numpy(draws), work.policy.device))
    results = _results(measured, given, inputs._replace(running=running), work.config)
    if backward:
        towards = torch.autograd.grad(results.losses.sum() / count, seen, materialize_grads=True)
        for places, part in parts if kept else work.micro_batches(backward=True):
            torch.autograd.backward(
                [part.chosen_weighed, part.rejected_weighed], [gradient[places] for gradient in towards]
            )
    return PairResults(*(column.detach() for column in results))


@dataclass(frozen=True, slots=True)
class _Work:
    """The forwards of one step, as this process makes them."""

    policy: Policy
    config: TrainConfig
    groups: Sequence[PromptGroup]
    plans: Sequence[Sequence[Sequence[int]]]
    """Of every process, the groups of each micro-batch."""
    world: World
    stop: StopSignals

    def micro_batches(
        self, *, backward: bool, see: SeeLogps | None = None
    ) -> Iterator[tuple[Tensor, Measured]]:
        """This process's micro-batches: (pairs,) places among the step's pairs, and what the policy says.

        Args:
            backward: Whether the caller computes gradients of each before it asks for the next.
            see: Called with the token log-probs of each.
        """
        policy, plan = self.policy, self.plans[self.world.rank]
        for number, members in enumerate(plan):
            if self.world.size == 1:
                self.stop.check(self.world)
            announce_micro_batch(policy, last=number == len(plan) - 1)
            if not members:
                join_empty(policy, backward=backward)
                continue
            groups = [self.groups[i] for i in members]
            places = to_device(
                torch.tensor([pair for group in groups for pair in group.pairs]), policy.device
            )
            yield places, self._measured(groups, see)

    def _measured(self, groups: Sequence[PromptGroup], see: SeeLogps | None) -> Measured:
        batch = self.policy.layout([group.sequences for group in groups])
        squares = None
        if self.config.use_weighting:
            squares = torch.empty(sum(batch.lengths), device=self.policy.device)
        logps = self.policy.batch_logps(batch.to(self.policy.device), log_squares=squares)
        if see:
            see(groups, torch.split(logps.detach(), batch.lengths))
        return measure(
            logps, batch.lengths, _sides(groups), ld_alpha=self.config.ld_alpha, log_squares=squares
        )


class _Given(NamedTuple):
    """What is known of pairs before any forward, on the device."""

    ref_logps: Tensor  # (pairs, 2) chosen, rejected
    lengths: Tensor  # (pairs, 2) scored tokens
    weight: Tensor | None  # (pairs,)
    margin: Tensor | None  # (pairs,)

    def at(self, places: Tensor) -> "_Given":
        """Of some of the pairs."""
        return _Given(*(None if values is None else values[places] for values in self))  # type: ignore[arg-type]

    def inputs(self, measured: Measured, config: TrainConfig) -> LossInputs:
        """Joined with what the policy says of the same pairs; its log-probs keep their gradients."""
        ref_chosen_logps, ref_rejected_logps = self.ref_logps.unbind(1)
        chosen_lengths, rejected_lengths = self.lengths.unbind(1)
        return LossInputs(
            chosen_logps=measured.chosen_weighed,
            rejected_logps=measured.rejected_weighed,
            ref_chosen_logps=ref_chosen_logps,
            ref_rejected_logps=ref_rejected_logps,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            beta=config.beta,
            data_margins=self.margin,
        )


def _given(
    pairs: Sequence[ScoredPair],
    config: TrainConfig,
    weights: Sequence[float] | None,
    margins: Sequence[float] | None,
    device: torch.device,
) -> _Given:
    references = [reference_sums(pair, config.ld_alpha) for pair in pairs]
    lengths = [(pair.chosen_counted, pair.rejected_counted) for pair in pairs]
    weight, margin = (
        None if values is None else to_device(torch.tensor(values, dtype=torch.float64), device)
        for values in (weights, margins)
    )
    ref_logps = to_device(torch.tensor(references, dtype=torch.float64), device)
    return _Given(ref_logps, to_device(torch.tensor(lengths), device), weight, margin)


def _results(measured: Measured, given: _Given, inputs: LossInputs, config: TrainConfig) -> PairResults:
    """The losses keep their gradients."""
    loss = preference_loss(config.loss_type, inputs, loss_weights=config.loss_weights, **config.loss_options)
    losses = loss.losses
    for weight in (measured.agreement if config.use_weighting else None, given.weight):
        if weight is not None:
            losses = losses * weight
    return PairResults(
        losses, measured.chosen_logps, measured.rejected_logps, loss.chosen_rewards, loss.rejected_rewards
    )


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
