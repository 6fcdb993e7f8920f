"""What a run does where memory runs out on a process: all of them go on in micro-batches half as large."""

import torch

from dpo_opt.optimize.begin import Run, RunState
from dpo_opt.schemas.errors import DpoOptError


def halve_micro_batches(run: Run, state: RunState, *, process: int, what: str) -> None:
    """Give all further micro-batches half the budget, and say so.

    Args:
        run: The run. Gradients of what broke off are dropped.
        state: Gets the smaller budget.
        process: The one whose memory ran out.
        what: What is repeated, such as ``step 3``.
    """
    run.optimizer.zero_grad(set_to_none=True)
    if run.policy.device.type == "cuda":
        torch.cuda.empty_cache()
    before = state.batching.budget
    state.batching = state.batching._replace(budget=max(1, before // 2))
    run.progress.say(
        f"memory ran out{_on(process, run)} in {what}: it is repeated, and from here on micro-batches "
        f"have at most {state.batching.budget} token rows, not {before}"
    )


def ran_out_again(run: Run, state: RunState, *, process: int, what: str, why: str, fix: str) -> DpoOptError:
    """The error of a run whose memory does not hold the smaller micro-batches either."""
    budget = state.batching.budget
    return DpoOptError(
        f"memory ran out again{_on(process, run)}, in micro-batches of at most {budget} token rows",
        where=what,
        why=why,
        fix=fix,
    )


def _on(process: int, run: Run) -> str:
    return f" on process {process}" if run.world.size > 1 else ""
