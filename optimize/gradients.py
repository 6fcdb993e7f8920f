"""Results and gradients of a step. One whose memory runs out is repeated, in micro-batches half as large."""

import math
from collections.abc import Callable, Sequence

import torch

from dpo_opt.optimize.begin import Run, RunState
from dpo_opt.optimize.micro_batches import SeeLogps
from dpo_opt.optimize.pair_results import PairResults
from dpo_opt.optimize.processes.distributed import least_of_ranks
from dpo_opt.optimize.run_folder import resume_command
from dpo_opt.optimize.step import forward_pairs
from dpo_opt.schemas.errors import DpoOptError
from dpo_opt.schemas.pairs import ScoredPair


def try_step(
    run: Run, state: RunState, pairs: Sequence[ScoredPair], see: SeeLogps | None = None
) -> PairResults | None:
    """Results and gradients of a step; None if memory ran out on this process.

    The others learn of it without an exchange of their own: its gradients are then NaN, so that the norm of
    all processes' gradients is, which each looks at before the update. See ``repeated_where_memory_ran_out``.
    """
    stream = run.prepared.stream
    try:
        return forward_pairs(
            run.policy,
            pairs,
            run.config,
            batching=state.batching,
            weights=stream.weights(pairs),
            margins=stream.margins(pairs),
            running=state.running,
            backward=True,
            stop=run.stop,
            see=see,
        )
    except torch.OutOfMemoryError:
        pass
    # Not in the handler: there the error still holds the tensors of the step.
    for parameter in run.parameters:
        if parameter.grad is not None:
            parameter.grad.fill_(math.nan)
    return None


def repeated_where_memory_ran_out(
    run: Run, state: RunState, results: PairResults | None, again: Callable[[], PairResults | None]
) -> PairResults:
    """The results of a step, and its gradients; of a second try, if memory ran out on any process.

    Every process must call this. The second try and all later steps have half the micro-batch budget.

    Args:
        run: The run. Gradients of the first try are dropped.
        state: Gets the smaller budget.
        results: Of ``try_step``.
        again: The second try.

    Raises:
        DpoOptError: Memory ran out again; on every process.
    """
    lost = _process_without_memory(run, results)
    if lost is None:
        assert results is not None
        return results
    run.optimizer.zero_grad(set_to_none=True)
    if run.policy.device.type == "cuda":
        torch.cuda.empty_cache()
    before = state.batching.budget
    state.batching = state.batching._replace(budget=max(1, before // 2))
    where = f" on process {lost}" if run.world.size > 1 else ""
    run.progress.say(
        f"memory ran out{where} in step {state.at.step + 1}: it is repeated, and from here on micro-batches "
        f"have at most {state.batching.budget} token rows, not {before}"
    )
    results = again()
    lost = _process_without_memory(run, results)
    if lost is None:
        assert results is not None
        return results
    where = f" on process {lost}" if run.world.size > 1 else ""
    raise DpoOptError(
        f"memory ran out again{where}, in micro-batches of at most {state.batching.budget} token rows",
        where=f"step {state.at.step + 1}",
        why="both completions of a pair run forward and backward together, so no micro-batch is smaller",
        fix=f"{resume_command(run.files.path)} --activation-checkpointing full",
    )


def _process_without_memory(run: Run, results: PairResults | None) -> int | None:
    """The last process whose memory ran out, the same on every process."""
    last = -least_of_ranks(-run.world.rank if results is None else 1, run.world)
    return None if last < 0 else last
