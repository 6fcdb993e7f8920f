"""How fast a run goes: pairs per second, and how much of a GPU's arithmetic the model's own makes up."""

import time
from collections.abc import Sequence

import torch

from dpo_opt.optimize.forward.architecture import decoder_of
from dpo_opt.optimize.forward.balance import ForwardCost, group_cost
from dpo_opt.optimize.forward.packing import pair_group
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.processes.distributed import World
from dpo_opt.optimize.run_folder import Metrics
from dpo_opt.schemas.pairs import ScoredPair

# Products of bf16 matrices without sparsity, FLOP/s, as NVIDIA's data sheets have them; the first name that
# is part of the device's counts.
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
    """What was done since the last line of metrics, and in what time.

    ``mfu`` is Model FLOPs Utilization (Chowdhery et al. 2022, appendix B): the floating-point operations that
    the steps need, each prompt counted once and recomputation not at all, per second, over what the GPUs
    could do in bf16. It is left out where the device's peak is not known, such as on a CPU.
    """

    def __init__(self, policy: Policy, cost: ForwardCost, world: World) -> None:
        self._cost = cost
        # Backward is two forwards: gradients of what was fed, and of weights, which frozen ones need not.
        adapted = any(not parameter.requires_grad for parameter in decoder_of(policy.model).parameters())
        self._passes = 2.0 if adapted else 3.0
        peak = _peak(policy)
        self._peak = None if peak is None else peak * world.size
        self._restart()

    def add(self, pairs: Sequence[ScoredPair]) -> None:
        """Count a step."""
        self._pairs += len(pairs)
        if self._peak is not None:
            self._flops += self._passes * sum(group_cost(pair_group(pair), self._cost) for pair in pairs)

    def leave_out(self, seconds: float) -> None:
        """Of the time since the last line: evaluations and checkpoints are no training."""
        self._began += seconds

    def metrics(self) -> Metrics:
        """``pairs_per_second`` and ``mfu``; counting begins anew."""
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
