"""What a loss is made of: log-probs of both completions of each pair, under the policy and the reference."""

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_opt.optimize.losses.running import Running


class LossInputs(NamedTuple):
    """What a loss may need from a batch of pairs. Log-probs are sums over a completion, in nats."""

    chosen_logps: Tensor  # (pairs,) the policy's
    rejected_logps: Tensor  # (pairs,)
    ref_chosen_logps: Tensor  # (pairs,) the reference's
    ref_rejected_logps: Tensor  # (pairs,)
    chosen_lengths: Tensor  # (pairs,) scored tokens
    rejected_lengths: Tensor  # (pairs,)
    beta: float
    """DPO's beta: how strongly the policy is held to the reference."""
    data_margins: Tensor | None = None  # (pairs,)
    """How much better chosen is than rejected, as the data says; only of losses that read it."""
    running: Running = Running()
    """The rewards of training so far; while training, these pairs' included."""
    draws: Tensor | None = None  # (pairs,)
    """Random numbers from 0 to 1, by which a loss may leave pairs out; None: it takes all."""
    labels: Tensor | None = None  # (rows,) bool
    """Of unpaired rows, whether the row's completion is desirable, and so stands as chosen. The other side is
    a completion of another prompt. None: these are pairs."""
    kl: Tensor | None = None  # (rows,) all alike
    """Of unpaired rows, the mean log-ratio of the step's mismatched completions, at least 0. None: that of
    these rows."""

    @property
    def chosen_logratios(self) -> Tensor:
        """(pairs,) log policy(chosen) - log reference(chosen), in nats."""
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        """(pairs,) log policy(rejected) - log reference(rejected), in nats."""
        return self.rejected_logps - self.ref_rejected_logps

    @property
    def chosen_rewards(self) -> Tensor:
        """(pairs,) implicit rewards of the chosen completions, up to a term that depends only on the prompt
        (Rafailov et al. 2023, eq. 5)."""
        return self.beta * self.chosen_logratios

    @property
    def rejected_rewards(self) -> Tensor:
        """(pairs,) implicit rewards of the rejected completions."""
        return self.beta * self.rejected_logratios

    @property
    def mismatched_logratios(self) -> Tensor:
        """(rows,) of unpaired rows, the log-ratios of the completions that belong to other prompts."""
        assert self.labels is not None
        return torch.where(self.labels, self.rejected_logratios, self.chosen_logratios)

    @property
    def margins(self) -> Tensor:
        """(pairs,) reward of chosen minus that of rejected: DPO's margin."""
        return self.chosen_rewards - self.rejected_rewards

    @property
    def chosen_mean_logps(self) -> Tensor:
        """(pairs,) the policy's log-prob per scored token of the chosen completions, in nats."""
        return self.chosen_logps / self.chosen_lengths

    @property
    def rejected_mean_logps(self) -> Tensor:
        """(pairs,) the policy's log-prob per scored token of the rejected completions, in nats."""
        return self.rejected_logps / self.rejected_lengths
