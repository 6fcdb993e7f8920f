"""Measures the speed of training: pairs per second, and model FLOPs utilization (MFU) on known GPUs."""

import time
from collections.abc import Sequence

import torch

from dpo_opt.optimize.forward.architecture import decoder_of
from dpo_opt.optimize.forward.balance import ForwardCost, group_cost
from dpo_opt.optimize.forward.packing import Group
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.forward.prompt_groups import mismatched_side, own_side, unique_groups
from dpo_opt.optimize.metrics_lines import Metrics
from dpo_opt.optimize.processes.distributed import World
from dpo_opt.schemas.pairs import ScoredPair

# Peak FLOP/s of dense bf16 matrix products, from NVIDIA's data sheets. The first name that is a part of the
# device's name applies.
_PEAKS = {
    "A100": 312e12,
    "L40S": 362e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


class Throughput:
    """Work and time since the last line of metrics.

    ``mfu`` is Model FLOPs Utilization (Chowdhery et al. 2022, appendix B): the floating-point operations per
    second that the steps need, divided by the GPUs' bf16 peak. What pairs have in common counts once, and
    recomputation does not count. Without a known peak, for example on a CPU, ``mfu`` is left out.
    """

    def __init__(self, policy: Policy, cost: ForwardCost, world: World) -> None:
        self._cost = cost
        # Backward costs two forwards: gradients of the inputs, and of the weights. Frozen weights need none.
        adapted = any(not parameter.requires_grad for parameter in decoder_of(policy.model).parameters())
        self._passes = 2.0 if adapted else 3.0
        peak = _peak(policy)
        self._peak = None if peak is None else peak * world.size
        self._restart()

    def add(self, pairs: Sequence[ScoredPair]) -> None:
        """Count a step."""
        self._pairs += len(pairs)
        if self._peak is None:
            return
        if pairs[0].label is None:
            self._flops += self._passes * self._forward(unique_groups(pairs))
        else:
            # Mismatched completions have no gradient.
            self._flops += self._passes * self._forward(unique_groups(pairs, own_side))
            self._flops += self._forward(unique_groups(pairs, mismatched_side))

    def _forward(self, groups: Sequence[Group]) -> float:
        return sum(group_cost(group, self._cost) for group in groups)

    def leave_out(self, seconds: float) -> None:
        """Do not count these seconds: evaluations and checkpoints are not training."""
        self._began += seconds

    def metrics(self) -> Metrics:
        """``pairs_per_second`` and ``mfu`` since the last call. Counting starts again."""
        seconds = time.perf_counter() - self._began
        found: Metrics = {"pairs_per_second": self._pairs / seconds}
        if self._peak is not None:
            found["mfu"] = self._flops / seconds / self._peak
        self._restart()
        return found

    def _restart(self) -> None:
        self._pairs, self._flops, self._began = 0, 0.0, time.perf_counter()


def _peak(policy: Policy) -> float | None:
    if policy.device.type != "cuda" or policy.dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(policy.device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)
