"""The update of ``bf16_adamw`` as one pass over a GPU's memory.

Import it only where there is a GPU: it needs Triton, which torch for CUDA brings along.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def update(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    keys: tuple[int, int],
) -> None:
    """One AdamW update in place, in fp32; what is stored is rounded stochastically.

    Args:
        parameter: bfloat16, contiguous, as are the moments.
        gradient: bfloat16 or float32, contiguous, as many elements.
        exp_avg: Mean of the gradients.
        exp_avg_sq: Mean of the squared gradients.
        step: Number of this update, from 1.
        lr: Learning rate.
        betas: Decay of the two means.
        eps: Added to the root of the second mean.
        weight_decay: Decoupled weight decay.
        keys: Of the hash that the random bits are, as int32.
    """
    count = parameter.numel()
    if not count:  # a process may have no part of a small parameter
        return
    _kernel[(triton.cdiv(count, _BLOCK),)](
        parameter,
        gradient,
        exp_avg,
        exp_avg_sq,
        count,
        1 - lr * weight_decay,
        betas[0],
        1 - betas[0],
        betas[1],
        1 - betas[1],
        lr / (1 - betas[0] ** step),
        (1 - betas[1] ** step) ** 0.5,
        eps,
        *keys,
        BLOCK=_BLOCK,
        # Whether products and sums are fused by default depends on the version, and would change last bits.
        enable_fp_fusion=False,
    )


@triton.jit(do_not_specialize=["first_key", "second_key"])
def _kernel(
    parameter,
    gradient,
    exp_avg,
    exp_avg_sq,
    count,
    decay,
    beta1,
    rest1,
    beta2,
    rest2,
    rate,
    correction,
    eps,
    first_key,
    second_key,
    BLOCK: tl.constexpr,
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < count
    value = tl.load(parameter + element, mask=inside).to(tl.float32)
    slope = tl.load(gradient + element, mask=inside).to(tl.float32)
    first = beta1 * tl.load(exp_avg + element, mask=inside).to(tl.float32) + rest1 * slope
    second = beta2 * tl.load(exp_avg_sq + element, mask=inside).to(tl.float32) + rest2 * slope * slope
    root = tl.div_rn(tl.sqrt_rn(second), correction) + eps
    value = value * decay - rate * tl.div_rn(first, root)

    # lowbias32 of the element, as in ``_Workspace.fill_noise``.
    bits = element.to(tl.uint32) + first_key.to(tl.uint32)
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D + second_key.to(tl.uint32)
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    of_moments = bits >> 16
    of_value = (bits ^ of_moments) & 0xFFFF
    tl.store(parameter + element, _rounded(value, of_value), mask=inside)
    tl.store(exp_avg + element, _rounded(first, of_moments), mask=inside)
    tl.store(exp_avg_sq + element, _rounded(second, of_moments), mask=inside)


@triton.jit
def _rounded(value, noise):
    # bfloat16 is the upper half of float32; the larger the lower half, the more often noise carries into it.
    upper = (value.to(tl.uint32, bitcast=True) + noise) >> 16
    # Noise would make a number of some NaNs.
    return tl.where(value == value, upper, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
