"""Computes a step's micro-batches, one after the other, and keeps several processes together.

A process whose memory runs out cannot just stop: the others wait for it in the middle of an exchange. It ends
the step with them, in micro-batches without pairs, and says so afterwards.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.forward.packing import to_device
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.forward.prompt_groups import PromptGroup
from dpo_opt.optimize.measured import Measured, measure
from dpo_opt.optimize.processes.distributed import World
from dpo_opt.optimize.processes.fsdp import announce_micro_batch, finish_broken_off, join_empty
from dpo_opt.optimize.stop_signals import StopSignals

Take = Callable[[Tensor, Measured], None]
"""Takes the (pairs,) places of a micro-batch's pairs among the step's, and what the policy says of them."""
SeeLogps = Callable[[Sequence[PromptGroup], Sequence[Tensor]], None]
"""Takes the groups of a micro-batch and the token log-probs of each of their sequences."""


@dataclass(slots=True)
class MicroBatches:
    """The forwards of one step, as this process makes them."""

    policy: Policy
    config: TrainConfig
    groups: Sequence[PromptGroup]
    plans: Sequence[Sequence[Sequence[int]]]
    """Of every process, the groups of each micro-batch."""
    world: World
    stop: StopSignals
    ran_out: bool = False
    """Whether memory ran out on this process, one of several."""

    def each(self, take: Take, *, backward: bool, see: SeeLogps | None = None) -> None:
        """Compute this process's micro-batches, one after the other.

        Args:
            take: Called with each of them.
            backward: Whether ``take`` computes gradients.
            see: Called with the token log-probs of each.

        Raises:
            torch.OutOfMemoryError: Memory ran out on a single process. One of several notes it, and joins the
                others' micro-batches to the last.
        """
        policy, plan = self.policy, self.plans[self.world.rank]
        for number, members in enumerate(plan):
            if self.world.size == 1:
                self.stop.check(self.world)
            announce_micro_batch(policy, last=number == len(plan) - 1)
            if self.ran_out or not members:
                join_empty(policy, backward=backward)
                continue
            groups = [self.groups[i] for i in members]
            self.finish(partial(self._compute, groups, take, see), backward=backward)

    def finish(self, work: Callable[[], None], *, backward: bool) -> None:
        """Do what is left of a micro-batch; if memory runs out, what the other processes need of it."""
        if not self.ran_out:
            try:
                return work()
            except torch.OutOfMemoryError:
                if self.world.size == 1:
                    raise
        # Not in the handler: there the error still holds the tensors of the micro-batch.
        self.ran_out = True
        finish_broken_off(self.policy, backward=backward)

    def _compute(self, groups: Sequence[PromptGroup], take: Take, see: SeeLogps | None) -> None:
        places = torch.tensor([pair for group in groups for pair in group.pairs])
        batch = self.policy.layout([group.sequences for group in groups])
        squares = None
        if self.config.use_weighting:
            squares = torch.empty(sum(batch.lengths), device=self.policy.device)
        logps = self.policy.batch_logps(batch.to(self.policy.device), log_squares=squares)
        if see:
            see(groups, torch.split(logps.detach(), batch.lengths))
        measured = measure(
            logps, batch.lengths, _sides(groups), ld_alpha=self.config.ld_alpha, log_squares=squares
        )
        take(to_device(places, self.policy.device), measured)


def _sides(groups: Sequence[PromptGroup]) -> list[tuple[int, int]]:
    """Of each pair of the groups, the places of chosen and rejected among all their sequences.

    Where one of the two is not computed, the other stands for it.
    """
    firsts = itertools.accumulate((len(group.sequences) for group in groups), initial=0)
    return [
        (places[0], places[-1])
        for first, group in zip(firsts, groups, strict=False)
        for sides in group.sides
        for places in [[first + place for place in sides if place is not None]]
    ]
