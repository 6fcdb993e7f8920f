"""Fills a sharded policy: each process reads its own part of every tensor from the model's files."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dpo_opt.optimize.forward.stored_weights import StoredWeights


def read_own_parts(weights: StoredWeights, device: torch.device) -> None:
    """Give the parameters of a sharded policy their numbers. Nothing is exchanged between the processes.

    Main memory holds one part of one tensor at a time, beside what is on a CPU for good.

    Args:
        weights: Of the policy's model, which was sharded on the ``meta`` device.
        device: Of the process.
    """

    def own_part(name: str, parameter: torch.nn.Parameter) -> Tensor:
        assert isinstance(parameter, DTensor)
        (chunk,) = parameter.__create_chunk_list__()  # type: ignore[no-untyped-call]
        local = parameter.to_local()
        if local.numel():
            rows = slice(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0])
            part = weights.read(name, rows).to(device, parameter.dtype)
        else:
            # Fewer rows than processes.
            part = torch.empty_like(local, device=device)
        return DTensor.from_local(
            part,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    weights.fill(own_part)
