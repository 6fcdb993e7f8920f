"""Forward and backward of one step's pairs: log-probs, losses, gradients, and the sums for the metrics."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.forward.balance import ForwardCost, balance
from dpo_opt.optimize.forward.packing import to_device
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.forward.prompt_groups import (
    Sides,
    both_sides,
    mismatched_side,
    own_side,
    prompt_groups,
)
from dpo_opt.optimize.losses.pair_inputs import LossInputs
from dpo_opt.optimize.losses.preference_loss import WHOLE_STEP, is_unpaired, preference_loss
from dpo_opt.optimize.losses.running import Running
from dpo_opt.optimize.measured import Measured, reference_sums
from dpo_opt.optimize.micro_batches import MicroBatches, SeeLogps
from dpo_opt.optimize.pair_results import PairResults
from dpo_opt.optimize.processes.distributed import World, sum_over_ranks
from dpo_opt.optimize.stop_signals import StopSignals
from dpo_opt.schemas.pairs import ScoredPair, TokenizedPair


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
    micro-batches, they are computed once more before. Of unpaired rows it needs those of the mismatched
    completions alone, which are computed once, without gradient.

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
        torch.OutOfMemoryError: Memory ran out on this process. If there are others, they do not know it: this
            one first took part in all that they exchange.
    """
    work_on = functools.partial(_work_on, policy, pairs, config, batching, stop)
    given = _given(pairs, config, weights, margins, policy.device)
    if is_unpaired(config.loss_type):
        mismatched, work = work_on(mismatched_side), work_on(own_side)
        given = _with_mismatched(mismatched, given, see)
        work.ran_out = mismatched.ran_out
        results = _of_each_pair(work, given, backward=backward, see=see)
    elif WHOLE_STEP.isdisjoint(config.loss_type):
        work = work_on(both_sides)
        results = _of_each_pair(work, given, backward=backward, see=see)
    else:
        work = work_on(both_sides)
        results = _of_whole_step(work, given, running or Running(), backward=backward, see=see)
    if work.ran_out:
        raise torch.OutOfMemoryError
    return results


def _of_each_pair(
    work: MicroBatches, given: "_Given", *, backward: bool, see: SeeLogps | None
) -> PairResults:
    """Results of losses that look at one pair at a time."""
    count, device = len(given.ref_logps), work.policy.device
    columns = torch.zeros(count, len(PairResults._fields), dtype=torch.float64, device=device)

    def take(places: Tensor, measured: Measured) -> None:
        part = given.at(places)
        measured = part.completed(measured)
        results = _results(measured, part, part.inputs(measured, work.config), work.config)
        if backward:
            torch.autograd.backward(results.losses.sum() / count)
        columns.index_copy_(0, places, torch.stack([column.detach() for column in results], dim=1))

    work.each(take, backward=backward, see=see)
    return PairResults(*sum_over_ranks(columns, work.world).unbind(1))


def _work_on(
    policy: Policy,
    pairs: Sequence[ScoredPair],
    config: TrainConfig,
    batching: Batching,
    stop: StopSignals,
    sides_of: Callable[[TokenizedPair], Sides],
) -> MicroBatches:
    """The forwards of some of the sequences of a step's pairs."""
    ranks, budget = batching.world.size, batching.budget
    groups = prompt_groups(pairs, rows=policy.rows, budget=budget, ranks=ranks, sides_of=sides_of)
    sequences = [group.sequences for group in groups]
    plans = balance(policy, sequences, budget=budget, cost=batching.cost, ranks=ranks)
    return MicroBatches(policy, config, groups, plans, batching.world, stop)


def _with_mismatched(work: MicroBatches, given: "_Given", see: SeeLogps | None) -> "_Given":
    """What is given of unpaired rows, with what the policy says of their mismatched completions."""
    others = torch.zeros(len(given.ref_logps), dtype=torch.float64, device=work.policy.device)

    def take(places: Tensor, part: Measured) -> None:
        others.index_copy_(0, places, part.chosen_logps)

    with torch.no_grad():
        work.each(take, backward=False, see=see)
    others = sum_over_ranks(others, work.world)
    assert given.label is not None
    ref_chosen_logps, ref_rejected_logps = given.ref_logps.unbind(1)
    kl = torch.relu((others - torch.where(given.label, ref_rejected_logps, ref_chosen_logps)).mean())
    return given._replace(other_logps=others, kl=kl.expand(len(others)))


def _of_whole_step(
    work: MicroBatches, given: "_Given", running: Running, *, backward: bool, see: SeeLogps | None
) -> PairResults:
    """Results of losses that look at all pairs at once."""
    count = len(given.ref_logps)
    # Where every process has one micro-batch, its forward is kept for backward.
    kept = backward and all(len(plan) == 1 and plan[0] for plan in work.plans)
    columns = torch.zeros(count, len(Measured._fields), dtype=torch.float64, device=work.policy.device)
    parts: list[tuple[Tensor, Measured]] = []

    def measure_part(places: Tensor, part: Measured) -> None:
        found = [torch.ones_like(part.chosen_logps) if c is None else c.detach() for c in part]
        columns.index_copy_(0, places, torch.stack(found, dim=1))
        if kept:
            parts.append((places, part))

    with torch.set_grad_enabled(kept):
        work.each(measure_part, backward=False, see=see)
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

        def differentiate(places: Tensor, part: Measured) -> None:
            torch.autograd.backward(
                [part.chosen_weighed, part.rejected_weighed], [gradient[places] for gradient in towards]
            )

        if kept:
            work.finish(lambda: differentiate(*parts.pop()), backward=True)
        else:
            work.each(differentiate, backward=True)
    return PairResults(*(column.detach() for column in results))


class _Given(NamedTuple):
    """What is known of pairs before any forward, on the device."""

    ref_logps: Tensor  # (pairs, 2) chosen, rejected
    lengths: Tensor  # (pairs, 2) scored tokens
    weight: Tensor | None  # (pairs,)
    margin: Tensor | None  # (pairs,)
    label: Tensor | None  # (pairs,) of unpaired rows
    other_logps: Tensor | None = None  # (pairs,) of unpaired rows, the policy's of mismatched completions
    kl: Tensor | None = None  # (pairs,) all alike

    def at(self, places: Tensor) -> "_Given":
        """Of some of the pairs."""
        return _Given(*(None if values is None else values[places] for values in self))  # type: ignore[arg-type]

    def completed(self, measured: Measured) -> Measured:
        """With both sides of unpaired rows, of which the policy was asked for their own alone."""
        if self.label is None or self.other_logps is None:
            return measured
        own, other = measured.chosen_logps, self.other_logps
        sides = torch.where(self.label, own, other), torch.where(self.label, other, own)
        return Measured(*sides, *sides, None)

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
            labels=self.label,
            kl=self.kl,
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
    label = None
    if is_unpaired(config.loss_type):
        label = to_device(torch.tensor([bool(pair.label) for pair in pairs]), device)
    return _Given(ref_logps, to_device(torch.tensor(lengths), device), weight, margin, label)


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
