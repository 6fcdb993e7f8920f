"""What the forward of a step says of each of its pairs."""

from typing import NamedTuple

from torch import Tensor


class PairResults(NamedTuple):
    """Results of each pair of a batch, on the device: all (pairs,) float64."""

    losses: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
